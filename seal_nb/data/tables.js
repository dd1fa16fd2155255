// For the whole page, once: headings of our tables sort, by a click or Enter, and take the keyboard focus.
// Numbers are compared as numbers wherever a cell begins with one ("+20.0%", also with the long minus sign), the rest as text.
// JupyterLab uses the arrow keys and Enter itself unless the focused element has the attribute that is set here, which
// cannot be set from Python. A widget appears after its output: its elements are marked when they are about to be used.
(function(){
const mark=()=>{
 document.querySelectorAll("table.sn-sorts thead th:not([tabindex])").forEach(head=>{
  head.tabIndex=0;head.style.cursor="pointer";head.title="sort by this column";head.setAttribute("aria-sort","none");
 });
 document.querySelectorAll(":is(.seal-nb-widget :is(select,button,input),.sn-sorts th)").forEach(
  one=>one.setAttribute("data-lm-suppress-shortcuts","true"));
};
mark();
if(window.sealNbSorts)return;
window.sealNbSorts=true;
const number=text=>parseFloat(text.replace("\u2212","-").replace(/,/g,""));
const sort=event=>{
 const head=event.target.closest&&event.target.closest("table.sn-sorts thead th");
 if(!head||(event.type==="keydown"&&event.key!=="Enter"))return;
 const up=head.getAttribute("aria-sort")!=="ascending",body=head.closest("table").tBodies[0];
 [...head.parentNode.cells].forEach(one=>one.setAttribute("aria-sort","none"));
 head.setAttribute("aria-sort",up?"ascending":"descending");
 const text=row=>row.cells[head.cellIndex].textContent.trim();
 const compare=(a,b)=>{const x=number(text(a)),y=number(text(b));
  if(isNaN(x)!==isNaN(y))return isNaN(x)?1:-1;
  return (isNaN(x)?text(a).localeCompare(text(b)):x-y)*(up?1:-1);};
 body.append(...[...body.rows].sort(compare));
};
["mouseover","focusin"].forEach(kind=>document.addEventListener(kind,mark));
["click","keydown"].forEach(kind=>document.addEventListener(kind,sort));
})()
