"""transformers' Trainer, with losses of its own and a state that holds no pickle."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from expertcut.errors import SettingsError
from expertcut.healing.training.balance import Balance
from expertcut.healing.training.batches import Batch, cut_rows, longest_first
from expertcut.healing.training.micro_batch import MicroBatch
from expertcut.healing.training.objectives import IGNORED, Likeliest, Objective
from expertcut.healing.training.projection import Projection, chunked_loss
from expertcut.healing.training.saved import (
    load_optimizer,
    load_random,
    random_states,
    save_optimizer,
    save_random,
    set_random_states,
)
from expertcut.healing.training.teacher import Teacher
from expertcut.models.load import MoeModel
from expertcut.models.memory import is_out_of_memory, trim

T = TypeVar("T")


class HealTrainer(Trainer):
    """Trains adapters on rows in the order given, as `Rows` has them."""

    objective: Objective
    teacher: Teacher | None
    micro_batch: MicroBatch
    model: Any

    def __init__(
        self, moe: MoeModel, objective: Objective, teacher: Teacher | None, **more: Any
    ) -> None:
        super().__init__(**more)
        self.objective = objective
        self.teacher = teacher
        self.balance: Balance | None = None
        self.balance_weight = 0.0
        self.moe = moe
        self.projection = Projection(moe)
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

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A step's share of this process, cut into micro-batches; gradients are left in weights.

        DistributedDataParallel is passed by: processes add their gradients up here, once all of
        them have had memory enough.
        """
        self.model.train()
        batch = longest_first(self._prepare_inputs(inputs))
        n_items = self._n_items(batch, num_items_in_batch)
        is_shared = self.accelerator.num_processes > 1

        def of_step(n_rows: int) -> Tensor:
            pieces = list(cut_rows(batch, n_rows))
            if self.balance is not None and not is_shared:
                self.balance.begin()  # one pass of all rows counts by itself
                if len(pieces) > 1:
                    self._count_loads(self.balance, pieces)
                    self.balance.share()
            total = torch.zeros((), dtype=torch.float64, device=self.args.device)
            for piece in pieces:
                loss = self._loss(piece, n_items)
                self.accelerator.backward(loss)
                total += loss.detach()
                trim()
            return total.float()

        if self.balance is not None and is_shared:
            balance = self.balance
            self._within_memory(lambda n: self._count_loads(balance, cut_rows(batch, n)), batch)
            balance.share()
        loss = self._within_memory(of_step, batch)
        self._add_up_gradients()
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Per position that is trained on in the global batch; without gradients."""
        batch = longest_first(inputs)
        n_items = self._n_items(batch, num_items_in_batch)

        def of_batch(n_rows: int) -> Tensor:
            total = torch.zeros((), dtype=torch.float64, device=self.args.device)
            for piece in cut_rows(batch, n_rows):
                total += self._loss(piece, n_items)
                trim()
            return total.float()

        with torch.no_grad():
            loss = self._within_memory(of_batch, batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _n_items(self, batch: Batch, n_items: Tensor | int | None) -> float:
        """What a sum of losses is divided by.

        Over processes the mean is taken, of what is a share of the sum.
        """
        if n_items is None:
            return max(1, int((batch["labels"] != IGNORED).sum()))
        n_processes: int = self.accelerator.num_processes
        return float(n_items) / n_processes

    def _loss(self, batch: Batch, n_items: float) -> Tensor:
        """A micro-batch's part of the loss."""
        at_BS = batch["labels"] != IGNORED
        # Before the other model's pass, whose activations are kept until its gradients are there.
        said = None if self.teacher is None else self.teacher(batch, at_BS)
        if self.balance is None or not self.model.training:
            return self._objective(self._hidden(batch), batch, said) / n_items
        with self.balance.watching():
            hidden_BSH = self._hidden(batch)
        loss = self._objective(hidden_BSH, batch, said) / n_items
        balance = self.balance.loss(batch["attention_mask"])
        n_processes: int = self.accelerator.num_processes
        return loss + self.balance_weight * balance * n_processes

    def _hidden(self, batch: Batch) -> Tensor:
        trim()  # passes over rows of ever other lengths leave gaps that add up
        ids_BS, mask_BS = batch["input_ids"], batch["attention_mask"]
        hidden_BSH = self.projection.hidden(self.model, ids_BS, mask_BS)
        trim()
        return hidden_BSH

    def _objective(self, hidden_BSH: Tensor, batch: Batch, said: Likeliest | None) -> Tensor:
        """The weighted sum over positions."""
        at_BS = batch["labels"] != IGNORED
        next_M, weight_M = batch["labels"][at_BS], batch["weight_BS"][at_BS]

        def of_chunk(logits_NV: Tensor, at: slice) -> Tensor:
            loss_N = self.objective.loss(logits_NV, next_M[at], said[at] if said else None)
            return (loss_N * weight_M[at]).double().sum()

        return chunked_loss(self.projection, self.model, hidden_BSH[at_BS], of_chunk)

    @torch.no_grad()
    def _count_loads(self, balance: Balance, pieces: Iterable[Batch]) -> bool:
        """Passes that only count, and leave the random state as it was for those that learn."""
        before = random_states()
        balance.begin()
        for piece in pieces:
            with balance.watching():
                self._hidden(piece)
            balance.count(piece["attention_mask"])
        set_random_states(before)
        return True

    def _within_memory(self, work: Callable[[int], T], batch: Batch) -> T:
        """Work on so many rows at once; again with half of them, in all processes, if memory ends.

        Raises:
            ModelError: there is not enough for one row.
        """
        before = random_states()
        while True:
            found = None
            try:
                found = work(self.micro_batch.rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if self._have_all(found is not None) and found is not None:
                return found
            self.model.zero_grad(set_to_none=True)
            self.micro_batch.halve(self.moe, batch["input_ids"].shape[1])
            set_random_states(before)

    def _have_all(self, is_done: bool) -> bool:
        """Whether every process had memory enough."""
        if self.accelerator.num_processes == 1:
            return is_done
        done = torch.tensor(float(is_done), device=self.args.device)
        return bool(self.accelerator.reduce(done, "mean") == 1)

    def _add_up_gradients(self) -> None:
        """The mean over processes, as losses are multiplied by their number."""
        if self.accelerator.num_processes == 1:
            return
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        own = [torch.zeros_like(w) if w.grad is None else w.grad for w in trained]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in own]), "mean")
        for weight, part in zip(trained, flat.split([w.numel() for w in trained]), strict=True):
            weight.grad = part.view_as(weight).clone()

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
