"""What a cut touches, against a plain loop over the prompts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertcut.data import Selection, load_quiz
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.selection import choose, removed_traffic
from expertcut.models.hooks import Routing, observe_routers
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.packing import encode
from tests.conftest import open_model


@pytest.mark.parametrize("stats", ["all", "answer"])
def test_mass_and_questions_are_those_of_the_prompts_run_alone(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path, stats: str
) -> None:
    moe = open_model(checkpoint("olmoe", num_experts=48))
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1))
    list(Measurement(moe, quiz, None, MeasureOptions(stats=stats)).run(tmp_path / "p"))  # type: ignore[arg-type]
    profile = load_profile(tmp_path / "p")
    edits = choose(profile, CutSettings(keep_active=True, layout="exact")).draft.edits
    gone = {b.layer: torch.tensor(edits[b.name].removed(48)) for b in moe.blocks}
    mass, total = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    n_questions, used = torch.zeros(2), [set[int](), set[int]()]

    def see(routing: Routing) -> None:
        hit_TK = torch.isin(routing.experts_TK, gone[routing.layer])
        mass[routing.layer] += routing.weights_TK[hit_TK].double().sum()
        total[routing.layer] += routing.weights_TK.double().sum()
        n_questions[routing.layer] += bool(hit_TK[-1].any())
        used[routing.layer].update(routing.experts_TK[hit_TK].tolist())

    with observe_routers(moe.blocks, see), torch.inference_mode():
        for subject, questions in quiz.questions.items():
            for question in questions:
                ids = encode(moe.tokenizer, [question], quiz.shots_by_subject[subject]).prompts[0]
                moe.model(input_ids=torch.tensor([ids]), use_cache=False)
    found = removed_traffic(profile, edits)
    assert [t.n_removed for t in found] == [len(ids) for ids in gone.values()]
    assert [t.n_questions for t in found] == n_questions.tolist() == [0, 0]
    if stats == "answer":
        assert all(t.n_used is None and t.mass is None for t in found)
        return
    assert [t.n_used for t in found] == [len(ids) for ids in used]
    assert [t.mass for t in found] == pytest.approx((mass / total).tolist(), rel=1e-5)
    assert min(t.mass or 0 for t in found) > 0.01


def test_a_cut_that_the_answers_use_counts_their_questions(
    profile_of: Callable[..., Profile],
) -> None:
    profile = profile_of("olmoe")
    edits = choose(profile, CutSettings(keep=2)).draft.edits
    for layer, found in enumerate(removed_traffic(profile, edits)):
        keep = set(edits[found.block].keep)
        rows = profile.array("chosen_NLK")[:, layer].tolist()
        assert found.n_questions == sum(not keep.issuperset(row) for row in rows) > 0
