"""What was removed or tilted, by which rule, and what the questions that judge it said."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from expertcut.documents import first_fault
from expertcut.edits.plan import PLAN_FILE, Plan
from expertcut.errors import PlanError
from expertcut.publishing.card.evidence import public_name
from expertcut.publishing.card.origin import Origin
from expertcut.reporting.tables import Cell, Column, Table

_WHERE = {"answer": "at the answer position", "all": "over all tokens"}


class _HeldOut(BaseModel):
    """A line of `proof.held_out` in plan.json."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    against: str
    questions: int
    max_abs_logprob_diff: float
    median_abs_logprob_diff: float
    flipped: int


def is_pruned(origin: Origin) -> bool:
    """Whether experts were removed in any step, one that is not there any more among them."""
    edits = origin.steps[0].blocks.values() if not origin.is_here else ()
    was_before = any(edit.keep[-1] >= len(edit.keep) for edit in edits if edit.keep)
    return was_before or any(step.action.startswith("prune") for step in origin.steps)


def is_tilted(origin: Origin) -> bool:
    """Whether any step gave an expert a bias or a factor."""
    return any(edit.tilted for step in origin.steps for edit in step.blocks.values())


def change_sentences(plan: Plan, origin: Origin) -> Iterator[str]:
    """What this checkpoint is, against its base."""
    if is_pruned(origin):
        yield _kept(plan, origin)
    n_biased = sum(len(edit.bias) for edit in plan.blocks.values())
    n_scaled = sum(len(edit.scale) for edit in plan.blocks.values())
    if n_biased:
        where = "at every token" if plan.apply_at != "answer" else "where an answer is written"
        form = (
            "carried by a direction in the gate's row, which comes close to the bias itself"
            if plan.layout == "stock"
            else "a bias of the gate itself"
        )
        yield f"{_experts(n_biased)} a bias on the gate's logit, to act {where}: {form}."
    if n_scaled:
        yield f"{_experts(n_scaled)} a factor on the gate weight; who is chosen stays."


def _experts(n: int) -> str:
    return "1 expert gets" if n == 1 else f"{n} experts get"


def _kept(plan: Plan, origin: Origin) -> str:
    counts = [len(edit.keep) for edit in plan.blocks.values()]
    kept = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    of = "" if origin.n_experts is None else f" of {origin.n_experts}"
    if plan.removal == "constant":
        gives = "its mean output" if plan.removed == "mean" else "nothing"
        then = f"the router may still choose a removed expert, which then gives {gives}"
    else:
        then = "the others are cut out, and the router takes the next best"
    return f"Each of {len(counts)} MoE layers keeps {kept}{of} experts; {then}."


def step_sentences(origin: Origin) -> Iterator[str]:
    """The rule of every step, and the questions it was chosen on, first to last."""
    for step in origin.steps:
        chosen = step.chosen_on
        # Whether a quiz is on the Hub the plan does not say: a path is not to be published.
        quiz = chosen.quiz if chosen.quiz.count("/") == 1 else public_name(chosen.quiz, None)
        text = f"{step.action} (layout {step.layout})"
        if step.criterion != "by hand":
            text += f", by {step.criterion}, counted {_WHERE[step.positions]}"
        text += f", on {chosen.questions:,} {chosen.split} questions of {quiz}"
        if chosen.fitted_split:
            text += f", fitted on {chosen.fitted_questions:,} of {chosen.fitted_split}"
        yield f"{text}."


def held_out_table(plan: Plan) -> Table:
    """How far answers moved on the questions that judge; without rows where none was asked.

    Raises:
        PlanError: what stands there is of another form.
    """
    try:
        found = TypeAdapter(list[_HeldOut]).validate_python(plan.proof.get("held_out", []))
    except ValidationError as error:
        raise PlanError(f"{PLAN_FILE}: proof.held_out.{first_fault(error)}") from None
    rows: list[list[Cell]] = [
        [f.against, f.max_abs_logprob_diff, f.median_abs_logprob_diff, f.flipped, f.questions]
        for f in found
    ]
    columns = (
        Column("against"),
        Column("largest |Δ log p|", ".4f"),
        Column("median |Δ log p|", ".4f"),
        Column("flipped answers", ",d"),
        Column("questions", ",d"),
    )
    return Table("How far answers moved", columns, rows)
