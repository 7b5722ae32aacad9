"""How `reweight` chooses experts and strengths where they are not all given by hand."""

from typing import TYPE_CHECKING, Annotated

from expertcut.cli.options import Format, option
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.running import bar

if TYPE_CHECKING:
    from expertcut.edits.reweight_tune import Procedure
    from expertcut.evaluation.reweight_search import DecideOptions, Decision
    from expertcut.profiling.storage import Profile

BoostBest = Annotated[
    int, option("Boost so many of the experts with the best score.", "--boost-best", min=0)
]
SuppressWorst = Annotated[
    int, option("Suppress so many of those with the worst.", "--suppress-worst", min=0)
]
By = Annotated[str | None, option("What scores experts: difference (default), accuracy, ...")]
MinAppearances = Annotated[
    float | None,
    option("Only experts in this share of questions or more; 0.01 without.", "--min-appearances"),
]
Layers = Annotated[str | None, option("Only these layers, as 0,3,8-15.")]
ContrastPair = Annotated[
    tuple[str, str] | None,
    option(
        "Score by how much more often A activates an expert than B; each is a profile, or "
        "PROFILE@right, PROFILE@wrong, PROFILE@subject,subject.",
        "--contrast",
        metavar="A B",
    ),
]
Strength = Annotated[
    float | None, option("Bias in logits; the admission gap without.", "--strength")
]
Tune = Annotated[bool, option("Search for the strength on the tuning questions.", "--tune")]
Prove = Annotated[
    bool, option("Cross-fit the whole procedure and hold it against random experts.", "--prove")
]
Draws = Annotated[
    int, option("Random experts that --prove compares with.", "--draws", min=99, max=10**6)
]
Seed = Annotated[int, option("Seed of folds and draws.", min=0)]


def decided(profile: "Profile", procedure: "Procedure", options: "DecideOptions") -> "Decision":
    """Chosen and proved on the tuning questions; prints what was found."""
    from expertcut.evaluation.reweight_search import decide
    from expertcut.reporting.edit_tables import decision_sentences, decision_tables

    quiet()
    with bar("proving", is_shown=options.is_proved) as report:
        found = decide(profile, procedure, options, report)
    print_tables(decision_tables(found), Format.table)
    for sentence in decision_sentences(found):
        print(sentence)
    return found
