"""Tables and sentences of what models read and predict in texts."""

from expertcut.profiling.schema import TextInfo
from expertcut.profiling.storage import Profile, TextProfile
from expertcut.reporting.tables import Cell, Table, columns


def texts_line(text: TextInfo) -> str:
    """How much was read, and of what."""
    shares = ", ".join(
        f"{name} {100 * source.tokens / text.n_tokens:.0f} %"
        for name, source in text.sources.items()
    )
    whose = " of the assistant" if text.assistant_only else ""
    of = shares if len(text.sources) > 1 else next(iter(text.sources))
    return f"{text.n_tokens:,} tokens{whose} in {text.n_documents:,} documents: {of}"


def profile_facts(profile: Profile) -> list[tuple[str, str]]:
    """The headline of a profile of texts."""
    assert isinstance(profile, TextProfile), "a quiz has another headline"
    facts = [("text", texts_line(profile.info.text))]
    if profile.info.text.has_loss:
        score = profile.score
        text = f"{score.perplexity:.3f}, next token right {score.accuracy:.2%}"
        facts.append(("perplexity", f"{text} of {score.scored:,}"))
    return facts


def sources_table(profile: TextProfile) -> Table:
    """One row per source."""
    info, rows = profile.info.text, []
    for name, known in info.sources.items():
        row: list[Cell] = [name, known.documents, known.tokens]
        if score := profile.scores.get(name):
            row += [score.perplexity, score.accuracy]
        rows.append(row)
    heads = "source; documents::,d; tokens::,d"
    heads += "; perplexity::.3f; next token right::.2%" if info.has_loss else ""
    return Table("Texts", columns(heads), rows, texts_line(info))
