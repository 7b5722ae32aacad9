"""One training run: set up, gone on with where it was stopped, its best adapters kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from expertcut.checkpoints.output_dir import system_errors
from expertcut.errors import ModelError, SettingsError
from expertcut.healing.asking import Training
from expertcut.healing.data.sources import Read
from expertcut.healing.training.batches import Collator
from expertcut.healing.training.micro_batch import choose_micro_batch, share_of_process
from expertcut.healing.training.objectives import Objective
from expertcut.healing.training.states import (
    best_step,
    held_out_losses,
    is_over,
    keep_best_and_last,
    last_usable,
    load_best,
    state_folder,
    train_losses,
)
from expertcut.healing.training.teacher import Teacher
from expertcut.healing.training.trainer import HealTrainer
from expertcut.models.load import MoeModel

Report = Callable[[int, int], None]  # steps done, of how many
Tell = Callable[[str], None]  # a sentence about how it will run
_FINITE = {
    "loss": "its loss",
    "grad_norm": "the norm of its gradient",
    "eval_loss": "the loss of held-out rows",
}  # as Trainer calls them


@dataclass(frozen=True)
class Curve:
    """What was seen: the loss of each step, and by step that of the held-out rows.

    `micro_batch` rows were in memory at once.
    """

    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    best_step: int
    steps: int
    micro_batch: int


def fit(
    moe: MoeModel,
    model: Any,
    read: Read,
    how: Training,
    kind: tuple[Objective, Teacher | None],
    place: tuple[Path, Report],
    tell: Tell = lambda sentence: None,
) -> Curve:
    """Trains the adapters of a peft model and leaves the best in it, by held-out rows.

    A run that was stopped goes on from its last state in the folder.

    Raises:
        ModelError: a loss or gradient that is no finite number, or too little memory for one row.
        OutputError: the best state was damaged meanwhile.
        SettingsError: a batch that cannot be shared out, or a device that Trainer does not take.
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
        callbacks=[_Watch(how, folder), _Progress(report)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints
    trainer.micro_batch = choose_micro_batch(moe, model, trainer.projection, read, how, folder)
    tell(trainer.micro_batch.sentence(how.batch))
    if how.balance:
        trainer.add_balance(how.balance)
    state = _trained(trainer, how, folder)
    best = best_step(state)
    trainer.accelerator.wait_for_everyone()  # the first has written the last state
    load_best(model, folder, best)
    trainer.accelerator.wait_for_everyone()  # each has read the best adapters
    losses = (train_losses(state), held_out_losses(state))
    return Curve(*losses, best, state.global_step, trainer.micro_batch.rows)


def _trained(trainer: HealTrainer, how: Training, folder: Path) -> TrainerState:
    """Where the run ended, now or before: a stop may have come after its last step."""
    with PartialState().main_process_first():  # it clears up what the others then do not find
        last = last_usable(folder)
    if last is not None and is_over(last, how):
        return last
    begin = None if last is None else str(state_folder(folder, last.global_step))
    with system_errors(folder):
        trainer.train(resume_from_checkpoint=begin)
    return trainer.state


def _arguments(moe: MoeModel, how: Training, folder: Path) -> TrainingArguments:
    n_processes = TrainingArguments(str(folder), use_cpu=moe.device.type == "cpu").world_size
    # Trainer's batches are whole steps: HealTrainer cuts them, so that no state depends on how.
    share = share_of_process(how.batch, n_processes, how.micro_batch)
    is_cuda = moe.device.type == "cuda"
    every = min(how.check_every, how.steps)
    arguments = TrainingArguments(
        str(folder),
        max_steps=how.steps,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
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
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would tell 0 instead
        remove_unused_columns=False,
        dataloader_pin_memory=is_cuda,
        disable_tqdm=True,
        report_to="none",
    )
    return _on_one_device(arguments, moe.device)


def _on_one_device(arguments: TrainingArguments, device: torch.device) -> TrainingArguments:
    """Where the model is; of several that one process sees, Trainer would take the first, or all.

    Raises:
        SettingsError: it would run elsewhere.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else DataParallel: other batches, other hooks
    theirs = arguments.device
    is_same = theirs.type == device.type and (theirs.type == "cpu" or theirs.index == device.index)
    if not is_same:  # CPUs are numbered by process
        raise SettingsError(
            f"--device {device}: training would run on {theirs}: leave --device out, "
            "and choose one of several by CUDA_VISIBLE_DEVICES"
        )
    return arguments


def _memory(how: Training) -> dict[str, Any]:
    """Activations computed again instead of kept; transformers renamed the option."""
    if not how.saves_memory:
        return {}
    known = TrainingArguments.__dataclass_fields__
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _pad_id(moe: MoeModel) -> int:
    pad_id: int | None = moe.tokenizer.pad_token_id
    return 0 if pad_id is None else pad_id


def _check_finite(step: int, logs: Mapping[str, float]) -> None:
    """Before a state is written: with a norm that is none, weights would be none after this step.

    Raises:
        ModelError: a number that is none.
    """
    for name, said in _FINITE.items():
        if not isfinite(found := logs.get(name, 0.0)):
            raise ModelError(
                f"training broke at step {step}: {said} is {found}: nothing is written; name "
                "another --out and a lower --learning-rate, or --dtype float32"
            )


class _Watch(TrainerCallback):
    """Ends a run that gains no more or breaks, and keeps two of its states."""

    def __init__(self, how: Training, folder: Path) -> None:
        self.how, self.folder = how, folder

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        _check_finite(state.global_step, more["logs"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if is_over(state, self.how):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            keep_best_and_last(self.folder, best_step(state))


class _Progress(TrainerCallback):
    """Tells how many steps are done."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.report(state.global_step, state.max_steps)
