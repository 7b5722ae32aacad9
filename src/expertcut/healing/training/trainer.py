"""transformers' Trainer, with losses of its own and a state that holds no pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from expertcut.errors import SettingsError
from expertcut.healing.training.balance import Balance
from expertcut.healing.training.objectives import IGNORED, Objective
from expertcut.healing.training.saved import (
    load_optimizer,
    load_random,
    save_optimizer,
    save_random,
)
from expertcut.healing.training.teacher import Teacher
from expertcut.moe.loading import MoeModel


class HealTrainer(Trainer):
    """Trains adapters on rows in the order given, as `Rows` has them."""

    objective: Objective
    teacher: Teacher | None

    def __init__(
        self, moe: MoeModel, objective: Objective, teacher: Teacher | None, **more: Any
    ) -> None:
        super().__init__(**more)
        self.objective = objective
        self.teacher = teacher
        self.balance: Balance | None = None
        self.balance_weight = 0.0
        self.moe = moe
        # Labels are those of the next token already, and are counted over the global batch.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self.can_return_loss = True
        self.label_names = ["labels"]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SettingsError(
                "heal runs on one device or data-parallel: start it without FSDP and DeepSpeed"
            )

    def add_balance(self, weight: float) -> None:
        """The load-balancing loss beside the objective."""
        self.balance_weight = weight
        self.balance = Balance(self.moe.blocks, lambda t: self.accelerator.reduce(t, "sum"))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Per position that is trained on in the global batch."""
        is_balanced = self.balance is not None and model.training
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.balance is not None and is_balanced:
            with self.balance.watching():
                outputs = model(**given, use_cache=False)
        else:
            outputs = model(**given, use_cache=False)
        labels_BS, n_items = inputs["labels"], num_items_in_batch
        loss = self._objective(outputs.logits, inputs) / (
            max(1, int((labels_BS != IGNORED).sum())) if n_items is None else n_items
        )
        if n_items is not None:  # the mean over processes is taken of what is a share of the sum
            loss = loss * self.accelerator.num_processes
        if self.balance is not None and is_balanced:
            balance = self.balance.loss(inputs["attention_mask"])
            loss = loss + self.balance_weight * balance / self.current_gradient_accumulation_steps
            if self.accelerator.sync_gradients:
                self.balance.begin()
        return (loss, {"loss": loss}) if return_outputs else loss

    def _objective(self, logits_BSV: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        at_BS = inputs["labels"] != IGNORED
        found = None if self.teacher is None else self.teacher(dict(inputs), at_BS)
        loss_M = self.objective.loss(logits_BSV[at_BS], inputs["labels"][at_BS], found)
        weighted_M: Tensor = loss_M * inputs["weight_BS"][at_BS]
        return weighted_M.sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = train_dataset or self.train_dataset
        return SequentialSampler(dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone; Trainer's own would pickle its arguments beside it."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            model: Any = self.model
            assert folder is not None
            model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_random(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint), self.args.process_index)

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: bfloat16 needs no scaler, and float16 is not offered."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing, as above."""
