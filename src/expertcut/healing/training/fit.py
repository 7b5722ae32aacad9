"""One training run: set up, gone on with where it was stopped, its best adapters kept."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from expertcut.checkpoints.files.folders import system_errors
from expertcut.errors import SettingsError
from expertcut.healing.asking import Training
from expertcut.healing.data.sources import Read
from expertcut.healing.training.batches import Collator
from expertcut.healing.training.objectives import Objective
from expertcut.healing.training.saved import is_whole
from expertcut.healing.training.teacher import Teacher
from expertcut.healing.training.trainer import HealTrainer
from expertcut.moe.loading import MoeModel

Report = Callable[[int, int], None]  # steps done, of how many
_KEPT = 2  # checkpoints: the best and the last


@dataclass(frozen=True)
class Curve:
    """What was seen: the loss of each step, and by step that of the held-out rows."""

    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    best_step: int
    steps: int


def fit(
    moe: MoeModel,
    model: Any,
    read: Read,
    how: Training,
    kind: tuple[Objective, Teacher | None],
    place: tuple[Path, Report],
) -> Curve:
    """Trains the adapters of a peft model and leaves the best in it, by held-out rows.

    A run that was stopped goes on from its last checkpoint in the folder.
    """
    objective, teacher = kind
    folder, report = place
    trainer = HealTrainer(
        moe, objective, teacher,
        model=model,
        args=_arguments(moe, how, folder),
        train_dataset=read.rows(how.steps * how.batch),
        eval_dataset=read.fixed(how.steps * how.batch),
        data_collator=Collator(
            objective.where, _pad_id(moe), how.weight_of_answers(objective.name)
        ),
        callbacks=[EarlyStoppingCallback(how.patience), _Progress(report)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints
    if how.balance:
        trainer.add_balance(how.balance)
    with system_errors(folder):
        trainer.train(resume_from_checkpoint=_last(folder))
    trainer.accelerator.wait_for_everyone()  # each has read the best adapters
    return _curve(trainer)


def _arguments(moe: MoeModel, how: Training, folder: Path) -> TrainingArguments:
    n_processes = TrainingArguments(str(folder), use_cpu=moe.device.type == "cpu").world_size
    micro = how.micro_batch or max(1, how.batch // n_processes)
    if how.batch % (micro * n_processes):
        raise SettingsError(
            f"--batch {how.batch} must be a multiple of --micro-batch {micro} times the "
            f"{n_processes} processes"
        )
    is_cuda = moe.device.type == "cuda"
    every = min(how.check_every, how.steps)
    return TrainingArguments(
        str(folder),
        max_steps=how.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=how.batch // (micro * n_processes),
        learning_rate=how.rate(moe.model.config.get_text_config().hidden_size),
        lr_scheduler_type="cosine",
        warmup_steps=how.warmup,
        weight_decay=0.0,
        seed=how.seed,
        bf16=is_cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not is_cuda,
        **_memory(how),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=_KEPT,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        remove_unused_columns=False,
        dataloader_pin_memory=is_cuda,
        ddp_find_unused_parameters=True if n_processes > 1 else None,
        disable_tqdm=True,
        report_to="none",
    )


def _memory(how: Training) -> dict[str, Any]:
    """Activations computed again instead of kept; transformers renamed the option."""
    if not how.saves_memory:
        return {}
    known = TrainingArguments.__dataclass_fields__
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _last(folder: Path) -> str | None:
    """The last checkpoint that was written whole; those that were not are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if _is_whole(path)]
    for path in found:
        if path not in whole:
            shutil.rmtree(path)
    return str(whole[-1]) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Trainer writes its state last; a kill may leave half of that, a power cut half of all."""
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return is_whole(checkpoint)


def _pad_id(moe: MoeModel) -> int:
    pad_id: int | None = moe.tokenizer.pad_token_id
    return 0 if pad_id is None else pad_id


def _curve(trainer: HealTrainer) -> Curve:
    history = trainer.state.log_history
    held_out = tuple((int(e["step"]), float(e["eval_loss"])) for e in history if "eval_loss" in e)
    best = min(held_out, key=lambda entry: entry[1])[0]
    losses = tuple(float(entry["loss"]) for entry in history if "loss" in entry)
    return Curve(losses, held_out, best, trainer.state.global_step)


class _Progress(TrainerCallback):
    """Tells how many steps are done."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.report(state.global_step, state.max_steps)
