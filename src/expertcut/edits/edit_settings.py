"""The settings of every edit; the commands extend them. Nothing heavy is imported here."""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from expertcut.data.sources import HELD_OUT_SHARE
from expertcut.edits.compression import (
    GROUP_SIZE,
    LOADERS,
    Grain,
    Loader,
    Option,
    Weigh,
    check_menu,
    parse_options,
)
from expertcut.edits.layouts import LAYOUTS, CutLayout, Fold, Positions, Removed
from expertcut.errors import SettingsError
from expertcut.settings import (
    Count,
    FilePath,
    Settings,
    Text,
    Texts,
    as_list,
    flag_of,
    like,
    numbers_in,
    option,
    refuse,
)

Budget = Literal["layer", "global"]
MergeMethod = Literal["m_smoe", "hc_smoe"]
RouterRow = Literal["fitted", "mean", "dominant"]

KEEP, RANK, ROUTER, CHECKPOINT = "What to keep", "How to rank", "Router", "Checkpoint"
_EXPERT = r"\s*(\d{1,9}:)?\d{1,9}(=[+-]?[\d.]+([eE][+-]?\d+)?)?\s*"
_LAYERS = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?")
CRITERIA_HERE = "{criteria}"  # replaced in help texts by the names of all criteria
_SIZE = re.compile(
    r"(?P<number>\d{1,19}(\.\d{0,19})?|\.\d{1,19})\s*((?P<prefix>[kmgt])(?P<binary>i)?)?(b)?", re.I
)


def criterion(text: str) -> str:
    """The criterion of that name or alias."""
    from expertcut.edits.criteria import criterion_name

    try:
        return criterion_name(text)
    except SettingsError as error:
        refuse(str(error))


def criteria(text: str) -> str:
    """Criteria separated by commas, with aliases resolved, or `all`."""
    return text if text == "all" else ",".join(criterion(part.strip()) for part in text.split(","))


def _check_share(value: float) -> float:
    if value not in (0, HELD_OUT_SHARE):
        refuse(
            f"must be {HELD_OUT_SHARE:g} or 0, not {value:g}: a profile keeps the sums of a fifth "
            "of its questions apart"
        )
    return value


HeldOut = Annotated[float, AfterValidator(_check_share)]
Criterion = Annotated[str, AfterValidator(criterion)]
Criteria = Annotated[str, AfterValidator(criteria)]
_Expert = Annotated[Text, like(_EXPERT, "is not an expert: write 12, 3:12 or 3:12=0.25")]
Experts = Annotated[list[_Expert], BeforeValidator(as_list), Field(min_length=1)]

# Options by panel of the help.
_keep = partial(option, panel=KEEP)
_rank = partial(option, panel=RANK)
_router = partial(option, panel=ROUTER)
_checkpoint = partial(option, panel=CHECKPOINT)
_judging = partial(option, panel="Judging")
_size = partial(option, panel="How small")
layout_option = partial(
    _checkpoint,
    "stock",
    "Form of the checkpoint: stock loads wherever the base model does; exact reproduces the edit "
    "exactly and loads in transformers with --trust-remote-code.",
)
positions_option = partial(
    _rank, None, "Tokens that the criterion counts.  [default: the criterion's own]",
    flags=("--tokens",), aliases=("--positions",),
)  # fmt: skip
apply_at_option = partial(
    _router, None,
    "Apply biases at these tokens only (answer: layout stock).  [default: all]",
)  # fmt: skip


class KeepSettings(Settings):
    """How many experts stay."""

    keep_active: bool = _keep(False, "Keep every expert that is ever routed to.")
    keep: Count | None = _keep(None, "Keep this many experts per layer.", metavar="N")
    keep_fraction: float | None = _keep(None, "Keep this share of the experts.", metavar="F")
    sparsity: float | None = _keep(
        None, "Remove this share of the experts.", metavar="F", is_recorded=False
    )
    max_bytes: Text | None = _keep(
        None, "Keep as many as fit in weights of this size, as 4GB, 500MB or 3.5GiB.",
        metavar="SIZE",
    )  # fmt: skip


class RankSettings(Settings):
    """How experts are ranked, and what replaces removed ones."""

    budget: Budget = _keep(
        "layer", "Keep equally many per layer, or rank all layers together (global, layout exact)."
    )
    min_keep: Count | None = _keep(
        None, "Keep at least this many per layer with --budget global.", metavar="N"
    )
    by: Criterion = _rank("activations", f"Criterion that ranks the experts: {CRITERIA_HERE}.")
    positions: Positions | None = positions_option()
    sequential: bool = _rank(
        False, "Score each layer with the layers before it already cut.", is_recorded="set"
    )
    protect: Texts = _rank(
        [], "Always keep super experts (super), expert L:E, or nothing (none); repeatable.  "
        "[default: super, none with --keep-active]", metavar="WHAT",
    )  # fmt: skip
    seed: int = _rank(0, "Seed of --by random.", ge=0)
    layout: CutLayout = layout_option()
    removed: Removed | None = _checkpoint(
        None, "Output of removed experts in layout exact.  [default: zero]",
        flags=("--replace-with",), aliases=("--removed",),
    )  # fmt: skip
    fold: Fold | None = _checkpoint(
        None, "Tokens over which layout stock fits the scale of gate weights.  [default: answer]",
        flags=("--rescale-gates",), aliases=("--fold",),
    )  # fmt: skip

    @property
    def at(self) -> Positions:
        """The tokens that the criterion counts."""
        from expertcut.edits.criteria import positions_of

        return positions_of(self.by, self.positions)

    def check_layout(self) -> None:
        """Refuses options that the layout does not support, with a SettingsError."""
        layout = LAYOUTS[self.layout]
        if self.removed is not None and "removed" not in layout.options:
            raise SettingsError(
                f"--replace-with {self.removed} needs --layout exact: add it or leave "
                "--replace-with out"
            )
        if self.fold is not None and "fold" not in layout.options:
            raise SettingsError(
                f"--rescale-gates {self.fold} needs --layout stock: {self.layout} scales nothing, "
                "leave it out"
            )
        if self.budget == "global" and layout.needs_equal_counts:
            raise SettingsError(
                "--budget global keeps another number in each layer, which layout stock cannot: "
                "add --layout exact"
            )
        if self.min_keep is not None and self.budget != "global":
            raise SettingsError(f"--min-keep {self.min_keep} needs --budget global: add it")

    def check_sequential(self) -> None:
        """Refuses what cannot be measured layer after layer, with a SettingsError."""
        if not self.sequential:
            return
        from expertcut.edits.criteria import CRITERIA, positions_of, read_criteria

        if self.budget == "global":
            raise SettingsError(
                "--budget global compares all layers before any is cut, --sequential cuts one "
                "after the other: leave one out"
            )
        for by in read_criteria(self.by):
            if not (choice := CRITERIA[by].positions):
                raise SettingsError(
                    f"--sequential changes nothing for --by {by}, which looks at no tokens: leave "
                    "it out"
                )
            if positions_of(by, self.positions) == "answer":
                do = "add --tokens all" if "all" in choice else "take another criterion"
                raise SettingsError(
                    f"--sequential measures over all tokens, and {by} counts answers: {do}"
                )


class CutSettings(RankSettings, KeepSettings):
    """How many experts stay, how they are ranked, and what replaces the others."""

    @model_validator(mode="after")
    def _sparsity_is_a_share(self) -> Self:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            refuse(f"--sparsity {self.sparsity:g} must be at least 0, below 1")
        return self

    @property
    def fraction(self) -> float | None:
        """The share of experts that stay, by `keep_fraction` or `sparsity`."""
        return self.keep_fraction if self.sparsity is None else round(1 - self.sparsity, 12)

    @property
    def size_bytes(self) -> int | None:
        """`max_bytes` as a number."""
        return None if self.max_bytes is None else read_size(self.max_bytes)

    def check(self) -> None:
        """Refuses options that do not go together, with a SettingsError."""
        numbers = (self.keep, self.keep_fraction, self.sparsity, self.max_bytes)
        if self.keep_active + sum(number is not None for number in numbers) != 1:
            raise SettingsError(
                "say how many experts to keep: --keep-active, --keep N, --keep-fraction F, "
                "--sparsity F or --max-bytes SIZE, and only one of them"
            )
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            raise SettingsError(
                f"--keep-fraction {self.keep_fraction:g} must be above 0, at most 1"
            )
        if self.keep_active and self.sequential:
            raise SettingsError(
                "--keep-active keeps what the unedited model routes to: give --sequential with "
                "--keep N or another number"
            )
        self.check_layout()
        self.check_sequential()
        if self.keep_active and self.budget == "global":
            raise SettingsError("--budget global ranks experts: give it without --keep-active")


def read_size(text: str, flag: str = "--max-bytes") -> int:
    """The bytes of `4GB`, `500MB`, `3.5GiB` or a plain number; SettingsError for other forms."""
    match = _SIZE.fullmatch(text.strip())
    power = " kmgt".index(((match and match["prefix"]) or " ").lower())
    unit = 1024 if match and match["binary"] else 1000
    size_bytes = int(float(match["number"]) * unit**power) if match else 0
    if not 1 <= size_bytes < 1 << 62:
        raise SettingsError(f"{flag} {text!r} is not a size: write it as 4GB, 500MB or 3.5GiB")
    return size_bytes


def read_fractions(text: str, option: str) -> tuple[float, ...]:
    """`0.75,0.5,0.25` as numbers in (0, 1], none twice."""
    shares: list[float] = []
    for part, share in numbers_in(text):
        if not 0 < share <= 1:
            raise SettingsError(f"{option} {text}: {part!r} must be a share above 0, at most 1")
        if share in shares:
            raise SettingsError(f"{option} {text} has {share:g} twice")
        shares.append(share)
    return tuple(shares)


def read_layers(text: str | None) -> tuple[int, ...]:
    """`0,3,8-15` as numbers, each once, none without a text; SettingsError for other forms."""
    layers: list[int] = []
    for part in text.split(",") if text is not None else ():
        first, _, last = part.strip().partition("-")
        if not _LAYERS.fullmatch(part.strip()) or int(first) > int(last or first):
            raise SettingsError(f"--layers: {part[:80]!r} is not a layer: write them as 0,3,8-15")
        layers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(layers))


class RouterSettings(Settings):
    """Experts whose gate is biased or scaled by hand."""

    boost: Experts | None = _router(
        None, "Add to an expert's gate logit: E, L:E, E=bias or L:E=bias; repeatable.",
        metavar="L:E",
    )  # fmt: skip
    suppress: Experts | None = _router(
        None, "Subtract from an expert's gate logit, as --boost; repeatable.", metavar="L:E"
    )
    scale: Experts | None = _router(
        None, "Scale an expert's gate weight, routing unchanged: E=F or L:E=F; repeatable.",
        metavar="L:E=F",
    )  # fmt: skip


class MergeSettings(Settings):
    """How many experts stay per layer, how they are grouped, and how groups are merged."""

    keep: Count = _keep(..., "Experts per layer afterwards.", metavar="N")
    by: MergeMethod = _rank(
        "m_smoe", "Group experts by router logits (m_smoe) or by mean outputs (hc_smoe)."
    )
    router: RouterRow = _checkpoint(
        "fitted",
        "Router row of a group: fitted to its routing mass, the mean, or that of its main member.",
    )
    align: bool | None = _checkpoint(
        None, "Put neurons in the same order before merging.  [default: in m_smoe]",
        flags=("--align/--no-align",),
    )  # fmt: skip

    @property
    def is_aligned(self) -> bool:
        """Whether neurons are aligned, by default as in the method's paper."""
        # arXiv:2310.01334 aligns, arXiv:2410.08589 does not.
        return self.by == "m_smoe" if self.align is None else self.align

    @property
    def slug(self) -> str:
        """The name of outputs, with the settings that differ from the defaults."""
        mark = "" if self.router == "fitted" else f"-{self.router}"
        if self.is_aligned != (self.by == "m_smoe"):
            mark += "-aligned" if self.is_aligned else "-unaligned"
        return f"merge-{self.keep}-{self.by}{mark}"

    @property
    def action(self) -> str:
        """The `action` of the plan."""
        text = f"merge --keep {self.keep} --by {self.by}"
        if self.router != "fitted":
            text += f" --router {self.router}"
        if self.align is not None:
            text += " --align" if self.align else " --no-align"
        return text


class CompressSettings(Settings):
    """What may become of each expert, how that is chosen, and for which loader it is written."""

    max_bytes: Text | None = _size(
        None, "Largest size of the weights, as 4GB, 500MB or 3.5GiB.", metavar="SIZE"
    )
    bits: float | None = _size(
        None, "Most bits that weights of experts have in the mean, without their scales.",
        metavar="B", gt=0, le=32,
    )  # fmt: skip
    sweep: str | None = _size(
        None, "Score these sizes, as 8GB,6GB,4GB, and write no checkpoint.", metavar="SIZES",
        in_recipe=False,
    )  # fmt: skip
    loader: Loader = _size(
        "transformers", "Program that is to load it: vllm, llama.cpp or transformers.",
        flags=("--for",),
    )  # fmt: skip
    options: Text | None = _size(
        None, "What an expert may become: widths in bits, lowrank:SHARE[:ROWS], mean, zero, copy "
        "or whole, separated by commas.  [default: the loader's widths]", metavar="LIST",
    )  # fmt: skip
    grain: Grain | None = _size(
        None, "One option for each expert, or for each layer.  [default: the finest of --for]"
    )
    group_size: Count = _size(GROUP_SIZE, "Weights that share a scale.", metavar="N", le=1 << 16)
    least: Text | None = _size(
        None, "Smallest option of an expert that no token chose.  [default: the smallest]",
        metavar="OPTION",
    )  # fmt: skip
    rest: int | None = _size(
        None, "Bits of all other weights, with --for llama.cpp.  [default: as they are]", ge=1, le=8
    )
    allow: Texts = _size(
        [], "Take a width that --for takes in new versions alone, as 2; repeatable.", metavar="B"
    )
    by: Literal["error", "pmq", "uniform", "random"] = _rank(
        "error",
        "Choose by the measured error, by PMQ's score, one option for all, or at random.",
    )
    weigh: Weigh = _rank(
        "output",
        "Weigh layers by the size of their output, or by the harm of noise there to answers.",
    )
    seed: int = _rank(0, "Seed of --by random and of the shuffled control.", ge=0)
    earlier: FilePath | None = _rank(
        None, "Take the errors of this checkpoint's compress.json, and measure none.",
        flags=("--from",), metavar="PATH", in_recipe=False,
    )  # fmt: skip

    @property
    def grain_taken(self) -> Grain:
        """The grain, by default the finest that the loader takes."""
        return self.grain or LOADERS[self.loader].grains[0]

    @property
    def menu(self) -> tuple[Option, ...]:
        """The options that are named, by default the loader's."""
        return parse_options(self.options or LOADERS[self.loader].options)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of `--sweep`, or that of `--max-bytes`, in bytes."""
        if self.sweep is not None:
            return tuple(read_size(part, "--sweep") for part in self.sweep.split(","))
        return () if self.max_bytes is None else (read_size(self.max_bytes),)

    @property
    def action(self) -> str:
        """The `action` of the plan."""
        words = [f"compress --max-bytes {self.max_bytes}" if self.max_bytes else "compress"]
        words += [f"--bits {self.bits:g}"] if self.bits else []
        for name in ("loader", "options", "grain", "group_size", "least", "rest", "by", "weigh"):
            if getattr(self, name) != CompressSettings.model_fields[name].default:
                words.append(f"{flag_of(CompressSettings, name)} {getattr(self, name)}")
        return " ".join(words)

    @property
    def slug(self) -> str:
        """The name of outputs, with the settings that differ from the defaults."""
        size = f"{self.bits:g}bit" if self.bits else f"{self.max_bytes}".replace(" ", "")
        marks = (
            "" if self.loader == "transformers" else self.loader,
            "" if self.by == "error" else self.by,
            "" if self.grain is None else self.grain,
        )
        return "-".join(filter(None, (size, *marks)))

    def check(self) -> None:
        """Refuses options that do not go together or that the loader does not take."""
        if [self.max_bytes, self.bits, self.sweep].count(None) != 2:
            raise SettingsError(
                "say how small: --max-bytes SIZE, --bits B or --sweep SIZES, and only one of them"
            )
        if len({*self.sizes}) < len(self.sizes):
            raise SettingsError(f"--sweep {self.sweep} has a size twice: name each once")
        if self.rest is not None and self.loader != "llama.cpp":
            raise SettingsError(
                f"--rest {self.rest} makes attention and embeddings smaller, which llama-quantize "
                "does: add --for llama.cpp, or leave --rest out"
            )
        if self.loader == "llama.cpp" and self.group_size != GROUP_SIZE:
            raise SettingsError(
                "the types of llama.cpp have blocks of their own: leave --group-size out"
            )
        if self.by == "pmq" and self.grain_taken == "layer":
            raise SettingsError(
                "--by pmq chooses among the experts of each layer: take --grain expert and --for "
                "transformers"
            )
        if self.earlier is not None:
            for name in ("weigh", "group_size"):
                if getattr(self, name) != CompressSettings.model_fields[name].default:
                    raise SettingsError(
                        f"{flag_of(CompressSettings, name)} changes errors, which --from takes as "
                        "they are: leave one of them out"
                    )
            return  # its menu is checked with what was measured
        self.check_options(self.menu, self.group_size)

    def check_options(self, menu: Sequence[Option], group_size: int) -> None:
        """Refuses what the loader does not take, and options that cannot be chosen so."""
        rest = [Option("bits", bits=self.rest)] if self.rest else []
        check_menu([*menu, *rest], self.loader, self.grain_taken, group_size, allow=self.allow)
        if self.by == "pmq" and any(option.kind != "bits" for option in menu):
            raise SettingsError("--by pmq scores widths in bits: leave other options out")
        if self.least is not None and Option.parse(self.least) not in menu:
            raise SettingsError(
                f"--least {self.least} is none of the options {','.join(map(str, menu))}"
            )


class ReweightSettings(RouterSettings):
    """Experts whose gate changes, named or chosen by a score, and how strongly."""

    boost_best: int = _rank(
        0, "Boost this many of the experts with the best score.", metavar="N", ge=0
    )
    suppress_worst: int = _rank(
        0, "Suppress this many of the experts with the worst score.", metavar="N", ge=0
    )
    by: str | None = _rank(
        None, "Score of the experts: difference, accuracy, ...  [default: difference]"
    )
    min_appearances: float | None = _rank(
        None, "Consider only experts in this share of the questions or more.  [default: 0.01]",
        metavar="F",
    )  # fmt: skip
    layers: Text | None = _rank(None, "Consider only these layers, as 0,3,8-15.")
    contrast: Annotated[list[str], Field(min_length=2, max_length=2)] | None = _rank(
        None, "Score by how much more often A routes to an expert than B; each is a profile, "
        "PROFILE@right, PROFILE@wrong or PROFILE@subject,subject.", metavar="A B",
    )  # fmt: skip
    balance: float | None = _router(
        None, "Even out the experts' loads of --trace: the largest at most 1 + M times the mean.",
        metavar="M", gt=0, is_recorded="set",
    )  # fmt: skip
    trace: FilePath | None = _router(
        None, "Trace with --logits, for --balance.", metavar="PATH", is_recorded="set",
        in_recipe=False,
    )  # fmt: skip
    strength: float | None = _router(None, "Bias in logits.  [default: the admission gap]")
    tune: bool = _router(False, "Search for the strength on the tuning questions.")
    apply_at: Positions | None = apply_at_option()
    layout: CutLayout = layout_option()

    prove: bool = _judging(
        False, "Cross-fit the whole procedure and compare it with random experts.",
        flags=("--cross-fit",), aliases=("--prove",), in_recipe=False,
    )  # fmt: skip
    draws: int = _judging(
        99, "Draws of random experts that --cross-fit compares with.",
        flags=("--random-draws",), aliases=("--draws",), in_recipe=False, ge=99, le=10**6,
    )  # fmt: skip
    seed: int = _judging(0, "Seed of the folds and draws.", in_recipe=False, ge=0)

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
        """Whether experts and strengths are all named."""
        is_open = self.is_choosing or self.is_deciding or self.strength is not None
        return not (is_open or self.balance is not None)

    @property
    def criterion(self) -> str:
        """The `criterion` of the plan."""
        if not self.is_choosing:
            return "by hand"
        return "contrast" if self.contrast else self.by or "difference"

    def check(self) -> None:
        """Refuses options that do not go together, with a SettingsError."""
        if self.balance is not None or self.trace is not None:
            self._check_balance()
            return
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
        if self.scale and not self.is_by_hand:
            raise SettingsError(
                "--scale takes its factor by hand: give it in a command of its own, without "
                "--boost-best, --suppress-worst, --strength, --tune and --cross-fit"
            )
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength > 0):
            raise SettingsError(f"--strength {self.strength:g} must be a number of logits above 0")
        if self.tune and self.strength is not None:
            raise SettingsError("--tune searches for the strength: leave the number out")

    def _check_balance(self) -> None:
        if self.balance is None:
            raise SettingsError(f"--trace {self.trace} needs --balance M: add it")
        if self.trace is None:
            raise SettingsError(
                f"--balance {self.balance:g} needs --trace TRACE, made by `expertcut trace "
                "--logits`: add it"
            )
        names = [
            *("boost", "suppress", "scale", "boost_best", "suppress_worst", "by", "contrast"),
            *("min_appearances", "layers", "strength", "tune", "apply_at", "prove"),
        ]
        fields = ReweightSettings.model_fields
        if others := [n for n in names if getattr(self, n) != fields[n].default]:
            raise SettingsError(
                f"--balance finds every bias from the loads: give "
                f"{flag_of(ReweightSettings, others[0])} in a command of its own"
            )


class AuditSettings(Settings):
    """The experts to ablate, and the criteria to compare with the damage."""

    sample: Count = _rank(64, "Experts to ablate, one at a time.", metavar="N")
    by: Criteria = _rank("all", f"Criteria to score, separated by commas, or all: {CRITERIA_HERE}.")
    fractions: str = _rank("0.75,0.5,0.25", "Kept shares at which regrets are computed.")
    questions: int = _judging(
        256, "Maximum of held-out questions, or rows of texts.", metavar="N", ge=2
    )
    positions: Positions | None = positions_option()
    layout: CutLayout = layout_option()
    seed: int = _rank(0, "Seed of the sample, of criterion random and of the intervals.", ge=0)

    def cut_by(self, by: str) -> CutSettings:
        """A cut by one of the criteria."""
        return CutSettings(by=by, positions=self.positions, layout=self.layout, seed=self.seed)
