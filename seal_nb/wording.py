"""Numbers with their nouns, as sentences, figures and tables say them."""


def counted(number: int, plural: str) -> str:
    """``counted(1, "passages")`` is "1 passage"; the plural's last letter goes where there is one of it."""
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"
