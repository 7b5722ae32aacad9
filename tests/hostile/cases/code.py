"""Code that comes with a checkpoint, and is not run: each of them would make a file."""

from pathlib import Path

from tests.hostile.case import Corpus
from tests.hostile.edits import (
    Change,
    Command,
    config,
    evaluate,
    in_model,
    profile,
    reweight,
)

CASES = Corpus("code")
EVIL = 'from pathlib import Path\nPath("ran").touch()\n'
MODULE = f"{EVIL}class Evil:\n    pass\n"


def with_code(name: str, change: Change, text: str = MODULE) -> Change:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        change(folder)

    return edit


def own(reference: str) -> Change:
    """A family of its own, whose classes are all this one."""
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), reference)
    return config(model_type="own", auto_map=classes)


CODE: dict[str, tuple[Change, Command, str, str]] = {
    "a family of its own": (
        with_code("evil.py", own("evil.Evil")),
        profile,
        r"olmoe/config\.json",
        "brings code of its own: read that, then --trust-remote-code",
    ),
    "a family of its own, met by eval": (
        with_code("evil.py", own("evil.Evil")),
        evaluate,
        r"olmoe/config\.json",
        "--trust-remote-code",
    ),
    "a family of its own, met by reweight": (
        with_code("evil.py", own("evil.Evil")),
        reweight,
        "profiles/finished",
        "another model",
    ),
    "a class of another repository": (
        own("other/repo--evil.Evil"),
        profile,
        r"olmoe/config\.json",
        "--trust-remote-code",
    ),
    "a class of a folder beside it": (
        with_code("../evil.py", own("../evil--evil.Evil")),
        profile,
        r"olmoe/config\.json",
        "--trust-remote-code|cannot be loaded",
    ),
    "our modelling file's name with other code": (
        with_code("modeling_exact.py", own("modeling_exact.Evil")),
        profile,
        r"olmoe/config\.json",
        "--trust-remote-code",
    ),
    "our modelling file's name in another repository": (
        own("other/repo--modeling_exact.ExactOlmoeForCausalLM"),
        profile,
        r"olmoe/config\.json",
        "--trust-remote-code",
    ),
    "an auto_map that is a list": (
        with_code("evil.py", config(model_type="own", auto_map=["evil.Evil"])),
        profile,
        r"olmoe/config\.json",
        "cannot be loaded|--trust-remote-code",
    ),
    "an auto_map of numbers": (
        config(model_type="own", auto_map={"AutoConfig": 7}),
        profile,
        r"olmoe/config\.json",
        "cannot be loaded|--trust-remote-code",
    ),
    "kernels for attention": (
        config(attn_implementation="someone/evil-kernels"),
        profile,
        r"olmoe/config\.json",
        "'someone/evil-kernels', which is code of others",
    ),
    "kernels for attention, in another spelling": (
        config(_attn_implementation="someone/evil-kernels@main:f"),
        profile,
        r"olmoe/config\.json",
        "which is code of others",
    ),
    "kernels for experts": (
        config(experts_implementation={"": "someone/evil-kernels"}),
        evaluate,
        r"olmoe/config\.json",
        "which is code of others",
    ),
}
for fault, (change, command, file, says) in CODE.items():
    CASES.add(fault, in_model(change, command), file, says)
