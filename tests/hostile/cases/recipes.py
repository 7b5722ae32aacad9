"""Recipes: YAML that wants to be more than data, and values that lead elsewhere."""

from tests.hostile.case import Corpus
from tests.hostile.spoiling import as_device, as_folder, as_pipe, spoiled, written
from tests.hostile.world import World

CASES = Corpus("recipes")
HEAD = f"model: {World.model}\nquiz: {World.quiz}\nshots: 0\nthreads: 1\n"
RUN = ["run", World.recipe, "--out", "new"]
TOUCH = "!!python/object/apply:os.system ['touch broken_in']"
LAUGHS = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def add(fault: str, text: bytes | str, says: str, is_whole: bool = False) -> None:
    content = text if is_whole or isinstance(text, bytes) else HEAD + text
    CASES.add(fault, written(World.recipe, content, *RUN), rf"{World.recipe} ", says)


for place, text in {
    "its root": TOUCH,
    "a value": f"{HEAD}device: {TOUCH}",
    "a list": f"{HEAD}subjects: [{TOUCH}]",
    "a key": f"{HEAD}? {TOUCH}\n: 1",
}.items():
    add(f"a tag that runs code in {place}", text, "tags are not read here", is_whole=True)
add("a tag that builds an object", "out: !!python/name:os.system", "tags are not read here")
add("a tag of its own", "out: !secret x", "tags are not read here")
add("a tag that says text", "out: !!str 7", "tags are not read here")
add("a tag that says bytes", "out: !!binary aGE=", "tags are not read here")
add("an anchor", "out: &here x", "anchors and aliases are not read here")
add("an alias", "out: *here", "anchors and aliases are not read here")
add("an anchor that holds itself", "subjects: &a [*a]", "anchors and aliases are not read here")
add("a billion laughs", LAUGHS, "anchors and aliases are not read here")
add("a merge key", "<<: {threads: 2}", "unknown key '<<'")
add("a merge of an alias", "show: &s {}\nprofile:\n  <<: *s", "anchors and aliases")
add("two documents", "---\nmodel: other\n", "another document")
add("a tab", "profile:\n\tsplit: test", "not valid YAML: line 6")
add("a bracket left open", "subjects: [a, b", "not valid YAML")
add("a quote left open", 'out: "x', "not valid YAML")
add("a key twice", "threads: 2", "the key 'threads' comes twice")
add("a key twice, deep", "profile: {split: val, split: test}", "the key 'split' comes twice")
add("a key that is a list", "? [a]\n: 1", "a key must be a word")
add("30 levels", "subjects: " + "[" * 30 + "]" * 30, "more than 20 levels")
add("100,000 levels", "subjects: " + "[" * 100_000, "more than 20 levels")
add("10 MB of levels", "[" * 10_000_000, "More than 256 KiB", is_whole=True)
add("10 MB of one key", "x" * 10_000_000, "More than 256 KiB", is_whole=True)
add("nothing", "", "holds nothing", is_whole=True)
add("a comment alone", "# later", "holds nothing", is_whole=True)
add("a text", "please profile olmoe", "holds a str", is_whole=True)
add("a list", "- model: olmoe", "holds a list", is_whole=True)
add("a byte that is no UTF-8", b"model: \xff", "byte 7 is not UTF-8")
add("UTF-16", "model: olmoe".encode("utf-16"), "UTF-8")
add("a NUL by its escape", 'device: "a\\0b"', "an escape that is not a character")
add("a NUL", b"model: ol\0moe", "not valid YAML")
add("an escape that is not a character", 'out: "\\ud800"', "an escape that is not a character")
add("no model", "quiz: birds", "model: Field required", is_whole=True)
add("a model that is a number", "device: 7", "device: .*string")
add("shots as text", HEAD.replace("shots: 0", "shots: '0'"), "shots: .*integer", is_whole=True)
add("shots below 0", HEAD.replace("shots: 0", "shots: -1"), "shots: .*greater", is_whole=True)
add("threads of 10^100", HEAD.replace("threads: 1", "threads: 1" + "0" * 100), "digits", True)
add("10^9 threads", HEAD.replace("threads: 1", f"threads: {10**9}"), "threads: .*4096", True)
add("10^12 tokens", f"batch_tokens: {10**12}", "batch_tokens: .*1073741824")
add("a limit that is true", "profile: {limit: true}", "limit: .*integer")
add("a share that is none", "variants: [{name: a, prune: {keep_fraction: .nan}}]", "keep_fraction")
add("a share of 1e999", "variants: [{name: a, prune: {keep_fraction: 1e999}}]", "finite")
add("an unknown key", "profil: {}", "unknown key 'profil': did you mean profile")
add("a key that pokes at classes", "__class__: x", "unknown key '__class__'")
add("profile in a list", "profile: [split]", "profile: ")
add("variants by name", "variants: {half: {prune: {keep: 4}}}", "variants: .*list")
for name in ("../../up", "/etc/passwd", "a/b", "a\\\\b", "..", ".hidden", "", "x" * 300, "a b"):
    add(
        f"a variant called {name[:20]!r}",
        f'variants: [{{name: "{name}", prune: {{keep: 4}}}}]',
        "variants.0.name: ",
    )
add("a variant called profile", "variants: [{name: profile, prune: {keep: 4}}]", "is taken")
add("a variant with a NUL", 'variants: [{name: "a\\0b", prune: {keep: 4}}]', "not a character")
add("a variant of nothing", "variants: [{name: a}]", "does one thing")
add("an expert of no number", "variants: [{name: a, reweight: {boost: first}}]", "not an expert")
add(
    "an expert with a bias of NaN",
    "variants: [{name: a, reweight: {boost: 1=nan}}]",
    "not an expert",
)
add("an expert with code", "variants: [{name: a, reweight: {boost: '1=exit()'}}]", "not an expert")
what = "variants: [{name: a, prune: {keep: 4, by: os}}]"
add("a criterion that is none", what, "not a criterion")
add("an output above", "out: ../elsewhere", "outside this folder")
add("an output from the root", "out: /tmp/expertcut", "outside this folder")
add("an output at home", "out: ~/.ssh", "outside this folder")
add("an offload folder above", "device_map: auto\noffload: a/../../b", "outside this folder")
for name in ("/tmp/cache", "../cache", "~/.cache"):
    add(
        f"a teacher's cache at {name}",
        f"variants: [{{name: a, prune: {{keep: 4}}}}, "
        f"{{name: b, heal: {{of: a, teacher_cache: {name}}}}}]",
        "teacher_cache: .*outside this folder",
    )
add("a quiz that is gone", HEAD.replace("birds", "./no"), "'./no' does not exist", is_whole=True)
add("a repository above", "publish: [{variant: a, repo: ../name}]", "not a repository")
add("code that comes with a model", "trust_remote_code: true", "add --trust-remote-code")
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
add("a token in a comment", f"# {TOKEN}", "holds a token or a password in line 5")
add("a token in a value", f"out: {TOKEN}", "holds a token or a password in line 5")
add("a password in an address", "out: https://me:swordfish@hub", "holds a token or a password")
CASES.add(
    "a folder in its place", spoiled(World.recipe, as_folder, *RUN), World.recipe, "directory"
)
CASES.add(
    "a pipe in its place", spoiled(World.recipe, as_pipe, *RUN), World.recipe, "ordinary file"
)
CASES.add("a device in its place", spoiled(World.recipe, as_device, *RUN), World.recipe, "ordinary")
CASES.add(
    "a split elsewhere",
    written(World.recipe, HEAD + "profile: {split: ../../etc}", *RUN),
    r"\.\./\.\./etc",
    "not the name of a split",
)
