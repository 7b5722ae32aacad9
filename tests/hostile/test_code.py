"""What a checkpoint brings that could run does not run unasked, also where it is not in the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from expertcut.errors import ModelError
from expertcut.models.load import LoadOptions, find_source, load
from tests.hostile.edits import json_of, text_of
from tests.support.exact_models import REMOVED, constants_for, make_exact

Checkpoints = Callable[..., Path]
ATTACK = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}x{% endfor %}"


@pytest.fixture
def olmoe(checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be spoiled; code in it that runs makes the file `ran` in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "olmoe"))


def evil(folder: Path, name: str, more: str = "") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(f"from pathlib import Path\nPath('ran').touch()\n{more}")


def opened(folder: Path, *, is_trusted: bool = False) -> object:
    return load(find_source(str(folder)), LoadOptions(trust_remote_code=is_trusted))


def naming_code(name: str, **classes: object) -> Callable[[Path], object]:
    return json_of(name, lambda content: content.update(auto_map=classes))


CLASS = "from transformers import OlmoeConfig\nclass Config(OlmoeConfig):\n    pass\n"


def test_code_of_a_known_family_runs_only_when_it_is_trusted(olmoe: Path, tmp_path: Path) -> None:
    evil(olmoe, "evil.py", CLASS)
    naming_code("config.json", AutoConfig="evil.Config")(olmoe)
    opened(olmoe)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="Unrecognized configuration class"):  # it is no model
        opened(olmoe, is_trusted=True)
    assert (tmp_path / "ran").exists()


def test_code_of_another_repository_is_not_fetched_for_a_known_family(
    olmoe: Path, tmp_path: Path
) -> None:
    evil(olmoe, "evil.py")
    named = "other/repo--evil.Evil"
    naming_code("config.json", AutoConfig=named, AutoModelForCausalLM=named)(olmoe)
    opened(olmoe)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="huggingface"):  # there is no network
        opened(olmoe, is_trusted=True)


def test_our_modelling_file_lends_no_trust_to_code_beside_it(olmoe: Path, tmp_path: Path) -> None:
    exact = tmp_path / "exact"
    make_exact(olmoe, exact, constants_for(REMOVED, is_zero=True))
    assert "auto_map" in json.loads((exact / "config.json").read_text())
    evil(exact, "custom_generate/generate.py", "def generate(model, **kwargs):\n    pass\n")
    (exact / "custom_generate" / "requirements.txt").write_text("")
    evil(exact, "tokenization_evil.py")
    naming_code("tokenizer_config.json", AutoTokenizer=[None, "tokenization_evil.Evil"])(exact)
    opened(exact)
    assert not (tmp_path / "ran").exists()


def test_chat_templates_and_generation_settings_are_carried_and_never_run(
    olmoe: Path, tmp_path: Path
) -> None:
    text_of("chat_template.jinja", ATTACK)(olmoe)
    (olmoe / "additional_chat_templates").mkdir()
    text_of("additional_chat_templates/tool.jinja", ATTACK)(olmoe)
    json_of("tokenizer_config.json", lambda c: c.update(chat_template=ATTACK))(olmoe)
    text_of("generation_config.json", "{")(olmoe)
    moe = load(find_source(str(olmoe)), LoadOptions())
    assert moe.tokenizer.chat_template is not None  # read, and not compiled
    assert moe.tokenizer(" A")["input_ids"]


def test_a_truncation_or_padding_that_the_tokenizer_asks_for_changes_no_prompt(
    olmoe: Path,
) -> None:
    text = "one two three " * 20
    before = load(find_source(str(olmoe)), LoadOptions()).tokenizer([text, "x"])["input_ids"]
    cut = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    pad = {
        **{"strategy": {"Fixed": 512}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    json_of("tokenizer.json", lambda c: c.update(truncation=cut, padding=pad))(olmoe)
    json_of("tokenizer_config.json", lambda c: c.update(model_max_length=5))(olmoe)
    after = load(find_source(str(olmoe)), LoadOptions()).tokenizer([text, "x"])["input_ids"]
    assert after == before and len(before[0]) > 50 > len(before[1])
