"""The settings of every edit; the commands extend them. Nothing heavy is imported here."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.errors import SettingsError
from expertcut.settings import Count, Settings, Text, Texts, as_list, like, option, refuse

Positions = Literal["answer", "all"]
Removed = Literal["zero", "mean"]  # the output of a removed expert in layout exact
Fold = Literal["answer", "all", "off"]  # tokens over which layout stock measures the inflation
Budget = Literal["layer", "global"]
MergeMethod = Literal["m_smoe", "hc_smoe"]
RouterRow = Literal["fitted", "mean", "dominant"]

KEEP, RANK, ROUTER, CHECKPOINT = "What to keep", "How to rank", "Router", "Checkpoint"
_EXPERT = r"\s*(\d{1,9}:)?\d{1,9}(=[+-]?[\d.]+([eE][+-]?\d+)?)?\s*"
_MANY = "; repeatable"
CRITERIA_HERE = "{criteria}"
"""Stands in a help text for the names of all criteria."""
_SIZE = re.compile(
    r"(?P<number>\d{1,19}(\.\d{0,19})?|\.\d{1,19})\s*((?P<prefix>[kmgt])(?P<binary>i)?)?(b)?", re.I
)
_TOO_MANY = 1 << 62  # bytes


def criterion(text: str) -> str:
    """The criterion of that name or alias."""
    from expertcut.edits.criteria import criterion_name

    try:
        return criterion_name(text)
    except SettingsError as error:
        refuse(str(error))


def criteria(text: str) -> str:
    """`reap,ean_sum` with the aliases resolved, or `all`."""
    return text if text == "all" else ",".join(criterion(part.strip()) for part in text.split(","))


Criterion = Annotated[str, AfterValidator(criterion)]
Criteria = Annotated[str, AfterValidator(criteria)]
_Expert = Annotated[
    Text, AfterValidator(like(_EXPERT, "is not an expert: write 12, 3:12 or 3:12=0.25"))
]
Experts = Annotated[list[_Expert], BeforeValidator(as_list), Field(min_length=1)]


def layout_option() -> Any:
    """The layout of the checkpoint, which most edits have."""
    return option(
        "stock",
        "Form of the checkpoint: stock loads wherever the base model does; exact changes nothing "
        "else and loads in transformers with --trust-remote-code.",
        panel=CHECKPOINT,
    )


def positions_option() -> Any:
    """The tokens at which a criterion counts."""
    return option(
        None,
        "Tokens that the criterion counts.  [default: the criterion's own]",
        panel=RANK,
        flags=("--tokens",),
        aliases=("--positions",),
    )


class CutSettings(Settings):
    """How many experts stay, how they are ranked, and what removing one means."""

    keep_active: bool = option(False, "Keep every expert that is ever routed to.", panel=KEEP)
    keep: Count | None = option(None, "Keep this many experts per layer.", panel=KEEP, metavar="N")
    keep_fraction: float | None = option(
        None, "Keep this share of the experts.", panel=KEEP, metavar="F"
    )
    sparsity: float | None = option(
        None, "Remove this share of the experts.", panel=KEEP, metavar="F", is_recorded=False
    )
    max_bytes: Text | None = option(
        None,
        "Keep as many as fit in weights of this size, as 4GB, 500MB or 3.5GiB.",
        panel=KEEP,
        metavar="SIZE",
    )
    budget: Budget = option(
        "layer",
        "Keep equally many per layer, or more where experts score more (global, layout exact).",
        panel=KEEP,
    )
    min_keep: Count | None = option(
        None, "Keep at least this many per layer with --budget global.", panel=KEEP, metavar="N"
    )
    by: Criterion = option(
        "activations", f"Criterion that ranks the experts: {CRITERIA_HERE}.", panel=RANK
    )
    positions: Positions | None = positions_option()
    protect: Texts = option(
        [],
        f"Keep super experts (super), no expert unasked (none), or expert L:E{_MANY}.  "
        "[default: super with --keep and --keep-fraction]",
        panel=RANK,
        metavar="WHAT",
    )
    seed: int = option(0, "Seed of --by random.", panel=RANK, ge=0)
    layout: Layout = layout_option()
    removed: Removed | None = option(
        None,
        "Output of removed experts in layout exact.  [default: zero]",
        panel=CHECKPOINT,
        flags=("--replace-with",),
        aliases=("--removed",),
    )
    fold: Fold | None = option(
        None,
        "Tokens over which layout stock measures how to rescale gate weights.  [default: answer]",
        panel=CHECKPOINT,
        flags=("--rescale-gates",),
        aliases=("--fold",),
    )

    @model_validator(mode="after")
    def _sparsity_is_a_share(self) -> Self:
        if self.sparsity is None:
            return self
        if not 0 <= self.sparsity < 1:
            refuse(f"--sparsity {self.sparsity:g} must be at least 0, below 1")
        return self

    @property
    def fraction(self) -> float | None:
        """The share of experts that stay, whichever of the two options says it."""
        if self.sparsity is None:
            return self.keep_fraction
        return round(1 - self.sparsity, 12)

    @property
    def size_bytes(self) -> int | None:
        """`max_bytes` as a number."""
        return None if self.max_bytes is None else read_size(self.max_bytes)

    @property
    def at(self) -> Positions:
        """The positions that count: the criterion's own where none were given."""
        from expertcut.edits.criteria import positions_of

        return positions_of(self.by, self.positions)

    @property
    def fill(self) -> Removed:
        """The output of a removed expert in layout exact."""
        return self.removed or "zero"

    @property
    def rescale(self) -> Fold:
        """The tokens over which layout stock measures the inflation."""
        return self.fold or "answer"

    def check(self) -> None:
        """That the size of the cut is given once, and in a form that the layout can carry.

        Raises:
            SettingsError: it is not.
        """
        shares = (self.keep_fraction, self.sparsity)
        numbers = (self.keep, *shares, self.max_bytes)
        if self.keep_active + sum(number is not None for number in numbers) != 1:
            raise SettingsError(
                "say how many experts to keep: --keep-active, --keep N, --keep-fraction F, "
                "--sparsity F or --max-bytes SIZE, and only one of them"
            )
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            raise SettingsError(
                f"--keep-fraction {self.keep_fraction:g} must be above 0, at most 1"
            )
        self.check_layout()
        if self.keep_active and self.budget == "global":
            raise SettingsError("--budget global ranks experts: give it without --keep-active")

    def check_layout(self) -> None:
        """That the layout can carry the budget and the other options.

        Raises:
            SettingsError: it cannot, or --min-keep is given without --budget global.
        """
        if self.removed is not None and "removed" not in LAYOUTS[self.layout].options:
            raise SettingsError(
                f"--replace-with {self.removed} is of layout exact: add --layout exact or leave it "
                "out"
            )
        if self.fold is not None and "fold" not in LAYOUTS[self.layout].options:
            raise SettingsError(
                f"--rescale-gates {self.fold} is of layout stock: {self.layout} scales nothing, "
                "leave it out"
            )
        check_budget(self.budget, self.min_keep, self.layout)


def check_budget(budget: Budget, min_keep: int | None, layout: Layout) -> None:
    """That the layout can carry the budget.

    Raises:
        SettingsError: it cannot, or --min-keep is given without --budget global.
    """
    if budget == "global" and LAYOUTS[layout].needs_equal_counts:
        raise SettingsError(
            "--budget global keeps another number in each layer, which layout stock cannot: "
            "add --layout exact"
        )
    if min_keep is not None and budget != "global":
        raise SettingsError(f"--min-keep {min_keep} needs --budget global: add it")


def read_size(text: str) -> int:
    """`4GB`, `500MB`, `3.5GiB` or a number of bytes as bytes.

    Raises:
        SettingsError: not of that form.
    """
    found = _SIZE.fullmatch(text.strip())
    power = " kmgt".index(((found and found["prefix"]) or " ").lower())
    unit = 1024 if found and found["binary"] else 1000
    size_bytes = int(float(found["number"]) * unit**power) if found else 0
    if not 1 <= size_bytes < _TOO_MANY:
        raise SettingsError(f"--max-bytes {text!r} is not a size: write it as 4GB, 500MB or 3.5GiB")
    return size_bytes


class RouterSettings(Settings):
    """Experts whose gate is biased or scaled by hand."""

    boost: Experts | None = option(
        None, f"Add to an expert's gate logit: E, L:E, E=bias or L:E=bias{_MANY}.",
        panel=ROUTER, metavar="L:E",
    )  # fmt: skip
    suppress: Experts | None = option(
        None, f"Subtract from an expert's gate logit, as --boost{_MANY}.",
        panel=ROUTER, metavar="L:E",
    )  # fmt: skip
    scale: Experts | None = option(
        None,
        f"Scale an expert's gate weight, routing unchanged: E=factor or L:E=factor{_MANY}.",
        panel=ROUTER,
        metavar="L:E=F",
    )


def apply_at_option() -> Any:
    """The tokens at which a bias acts."""
    return option(
        None, "Apply biases at these tokens only (answer: layout stock).  [default: all]",
        panel=ROUTER,
    )  # fmt: skip


class MergeSettings(Settings):
    """How many experts stay in each layer, what groups them, and how a group becomes one."""

    keep: Count = option(..., "Experts per layer afterwards.", panel=KEEP, metavar="N")
    by: MergeMethod = option(
        "m_smoe", "Group experts by router logits (m_smoe) or by mean outputs (hc_smoe).",
        panel=RANK,
    )  # fmt: skip
    router: RouterRow = option(
        "fitted", "Router row of a group: fitted to the members' mass, their mean, or one's own.",
        panel=CHECKPOINT,
    )  # fmt: skip
    align: bool | None = option(
        None, "Put neurons in the same order before merging.  [default: in m_smoe]",
        panel=CHECKPOINT, flags=("--align/--no-align",),
    )  # fmt: skip

    @property
    def is_aligned(self) -> bool:
        """Whether neurons are aligned: as given, else as the method's paper has it."""
        return self._paper_aligns if self.align is None else self.align

    @property
    def _paper_aligns(self) -> bool:
        return self.by == "m_smoe"  # arXiv:2310.01334 aligns, arXiv:2410.08589 does not

    @property
    def slug(self) -> str:
        """Names the outputs, with what makes them differ from the usual."""
        mark = "" if self.router == "fitted" else f"-{self.router}"
        if self.is_aligned != self._paper_aligns:
            mark += "-aligned" if self.is_aligned else "-unaligned"
        return f"merge-{self.keep}-{self.by}{mark}"

    @property
    def action(self) -> str:
        """As it stands in the plan."""
        text = f"merge --keep {self.keep} --by {self.by}"
        if self.router != "fitted":
            text += f" --router {self.router}"
        if self.align is not None:
            text += " --align" if self.align else " --no-align"
        return text


class ReweightSettings(RouterSettings):
    """Experts whose gate changes: named or chosen by a score, and how strongly."""

    boost_best: int = option(
        0, "Boost this many of the experts with the best score.", panel=RANK, metavar="N", ge=0
    )
    suppress_worst: int = option(
        0, "Suppress this many of those with the worst.", panel=RANK, metavar="N", ge=0
    )
    by: str | None = option(
        None, "Score of the experts: difference, accuracy, ...  [default: difference]", panel=RANK
    )
    min_appearances: float | None = option(
        None, "Consider only experts in this share of the questions or more.  [default: 0.01]",
        panel=RANK, metavar="F",
    )  # fmt: skip
    layers: Text | None = option(None, "Consider only these layers, as 0,3,8-15.", panel=RANK)
    contrast: Annotated[list[str], Field(min_length=2, max_length=2)] | None = option(
        None,
        "Score by how much more often A routes to an expert than B; each is a profile, "
        "PROFILE@right, PROFILE@wrong or PROFILE@subject,subject.",
        panel=RANK,
        metavar="A B",
    )
    strength: float | None = option(
        None, "Bias in logits.  [default: the admission gap]", panel=ROUTER
    )
    tune: bool = option(False, "Search for the strength on the tuning questions.", panel=ROUTER)
    apply_at: Positions | None = apply_at_option()
    layout: Layout = layout_option()

    prove: bool = option(
        False, "Cross-fit the whole procedure and compare it with random experts.",
        panel="Judging", flags=("--cross-fit",), aliases=("--prove",), in_recipe=False,
    )  # fmt: skip
    draws: int = option(
        99, "Draws of random experts that --cross-fit compares with.",
        panel="Judging", flags=("--random-draws",), aliases=("--draws",), in_recipe=False,
        ge=99, le=10**6,
    )  # fmt: skip
    seed: int = option(0, "Seed of the folds and draws.", panel="Judging", in_recipe=False, ge=0)

    @property
    def is_choosing(self) -> bool:
        """Whether experts are chosen by a score."""
        return bool(self.boost_best or self.suppress_worst)

    @property
    def is_deciding(self) -> bool:
        """Whether the model is run before anything is built."""
        return self.tune or self.prove

    @property
    def is_by_hand(self) -> bool:
        """Whether experts and strengths need no question to be asked."""
        return not (self.is_choosing or self.is_deciding or self.strength is not None)

    @property
    def criterion(self) -> str:
        """The plan's word for how experts were chosen."""
        if not self.is_choosing:
            return "by hand"
        return "contrast" if self.contrast else self.by or "difference"

    def check(self) -> None:
        """That the options go together.

        Raises:
            SettingsError: which does not.
        """
        if self.by is not None and self.contrast:
            raise SettingsError("--by and --contrast both score experts: give one of them")
        if self.min_appearances is not None and not 0 <= self.min_appearances <= 1:
            raise SettingsError(
                f"--min-appearances {self.min_appearances:g} must be a share from 0 to 1"
            )
        if (self.by or self.contrast) and not self.is_choosing:
            raise SettingsError(
                "--by and --contrast rank experts for --boost-best N and --suppress-worst N: "
                "give one of these"
            )
        if not (self.boost or self.suppress or self.scale or self.is_choosing):
            raise SettingsError(
                "say which experts to tilt: --boost E or --suppress E, E as in 3:12, "
                "--boost-best N or --suppress-worst N"
            )
        if self.is_by_hand:
            return
        if self.scale:
            raise SettingsError(
                "--scale takes its factor by hand: give it in a command of its own, without "
                "--boost-best, --suppress-worst, --strength, --tune and --cross-fit"
            )
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength > 0):
            raise SettingsError(f"--strength {self.strength:g} must be a number of logits above 0")
        if self.tune and self.strength is not None:
            raise SettingsError("--tune searches for the strength: leave the number out")


class AuditSettings(Settings):
    """Experts to ablate one at a time, and the criteria that are scored on it."""

    sample: Count = option(64, "Experts to ablate, one at a time.", panel=RANK, metavar="N")
    by: Criteria = option(
        "all", f"Criteria to score, separated by commas, or all: {CRITERIA_HERE}.", panel=RANK
    )
    fractions: str = option(
        "0.75,0.5,0.25", "Kept shares at which regrets are computed.", panel=RANK
    )
    questions: int = option(
        256, "Held-out questions to use at most.", panel="Judging", metavar="N", ge=2
    )
    positions: Positions | None = positions_option()
    layout: Layout = layout_option()
    seed: int = option(
        0, "Seed of the sample, of criterion random and of the intervals.", panel=RANK, ge=0
    )

    def cut_by(self, by: str) -> CutSettings:
        """A cut by one of the criteria, at the same positions and in the same layout."""
        return CutSettings(by=by, positions=self.positions, layout=self.layout, seed=self.seed)
