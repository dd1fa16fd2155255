"""The ceiling of single-passage evaluation: the same questions with the passage in the prompt, untrained.

What an adapter could at best have put into the weights (SEAL, arXiv 2506.10943, does not report it). The
server generates the answers; it grades only what was asked without the passage, so the answers are graded
here, by the grader that the server has: arms with verdicts of two graders cannot be compared. Greedy, as all
answers.
"""

from collections.abc import Mapping, Sequence

from seal_nb.errors import SettingsError
from seal_nb.experiments.graded_forms import check_grader
from seal_nb.experiments.single_passage import PlannedLoop
from seal_nb.grading.base import Answered, Grader
from seal_nb.passages import Passage
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import Answers, GenerateReply, GenerateRequest, TTTReply, build_reply
from seal_nb.runs import Journal, content_id
from seal_nb.service.client import TTTClient


def in_context_prompts(passage: Passage) -> list[str]:
    """The answer prompt of each question behind title and passage."""
    return [
        f"{passage.title}\n{passage.context.strip()}\n\n{answer_prompt(passage.title, question.question)}"
        for question in passage.questions
    ]


def in_context_request(passage: Passage, loop: PlannedLoop, *, model_id: str) -> GenerateRequest:
    """All questions of one passage. Raises: SettingsError where prompts would go through a chat template."""
    if loop.request.chat:
        raise SettingsError(
            "chat=True: the arm in_context has no chat form; leave it out, or set chat to False"
        )
    request = GenerateRequest(
        prompts=in_context_prompts(passage),
        max_tokens=loop.request.max_new_tokens,
        temperature=0.0,
        top_p=1.0,
        seed=loop.request.seed,
        priority=0,
    )
    content = request.model_dump(mode="json", exclude={"request_id", "priority", "traceback"})
    return request.model_copy(update={"request_id": content_id([model_id, content])})


def with_in_context(
    replies: Mapping[str, TTTReply],
    client: TTTClient,
    passages: Sequence[Passage],
    loops: Sequence[PlannedLoop],
    journal: Journal,
    *,
    model_id: str,
    grader: Grader | None,
) -> dict[str, TTTReply]:
    """`replies` with those to `loops` completed: baseline and in-context answers as one reply, by its id.

    What the server could not generate is left out, and so missing in the run. ``grader``: not needed without
    loops. Raises: SettingsError where the server behind ``model_id`` grades by another one.
    """
    if not loops:
        return dict(replies)
    if grader is None:
        raise SettingsError("the arm in_context is graded here; give the grader that the server has")
    check_grader(grader.name, model_id, where=client.where)
    answered = [loop for loop in loops if loop.request_id in replies]
    requests = [in_context_request(passages[loop.passage], loop, model_id=model_id) for loop in answered]
    missing = [request for request in requests if str(request.request_id) not in journal]
    for index, reply in client.run_indexed(missing):
        if isinstance(reply, GenerateReply):
            journal.append(str(missing[index].request_id), reply.model_dump(mode="json"))
    completed = {
        key: reply for key, reply in replies.items() if key not in {loop.request_id for loop in loops}
    }
    for loop, request in zip(answered, requests, strict=True):
        if str(request.request_id) in journal:
            generated = GenerateReply.model_validate(journal.get(str(request.request_id)))
            baseline = replies[loop.request_id]
            completed[loop.request_id] = _reply(baseline, generated, passages[loop.passage], grader)
    return completed


def _reply(baseline: TTTReply, generated: GenerateReply, passage: Passage, grader: Grader) -> TTTReply:
    texts = [text.strip() for text in generated.texts]
    verdicts = grader.grade(
        [
            Answered(question=question.question, gold=question.answer, answer=text, title=passage.title)
            for question, text in zip(passage.questions, texts, strict=True)
        ]
    )
    return build_reply(
        baseline=Answers(texts=baseline.baseline_texts, verdicts=list(baseline.baseline_verdicts)),
        adapter=Answers(texts=texts, verdicts=[str(verdict) for verdict in verdicts]),
        request_id=baseline.request_id,
        seed=baseline.seed,
        model_id=baseline.model_id,
        server_id=baseline.server_id,
    )
