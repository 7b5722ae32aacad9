"""One training run with a subclass of transformers' Trainer: own losses, no pickle."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from expertcut.checkpoints.output_dir import system_errors
from expertcut.errors import ModelError, SettingsError
from expertcut.healing import objectives
from expertcut.healing import state as states
from expertcut.healing.data import TrainingData
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.micro_batch import MicroBatch, choose_micro_batch, share_of_process
from expertcut.healing.objectives import Batch
from expertcut.models.devices import trim, unless_out_of_memory
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.scoring.projection import Projection, TopLogprobs

T = TypeVar("T")
Report = Callable[[int, int], None]  # steps done, all steps
Tell = Callable[[str], None]  # a sentence for the user


class Balance:
    """Load-balancing loss Σ_e f_e · P_e · E, the mean over blocks: 1 at equal load.

    f_e is expert e's share of the choices, P_e its mean probability (Switch Transformer,
    arXiv:2101.03961, equations 4 to 6), over all tokens of a step and not of a micro-batch
    (arXiv:2501.11873). So f is counted first, in separate passes if a step has several
    micro-batches, and a micro-batch's loss is its tokens' share of the whole.
    """

    def __init__(self, blocks: Sequence[MoeBlock], reduce: Callable[[Tensor], Tensor]) -> None:
        self.blocks, self.reduce = blocks, reduce  # a sum over all processes
        self.seen: dict[int, Routing] = {}
        self.begin()

    def begin(self) -> None:
        """Starts a new optimizer step."""
        self.own: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Records the routing of a forward pass."""
        self.seen = {}
        # The hook computes nothing: gradient checkpointing would compute it again.
        with observe_routers(self.blocks, lambda r: self.seen.update({r.layer: r})):
            yield

    def count(self, mask_BS: Tensor) -> None:
        """Adds the choices of the recorded pass, without padding."""
        real_T = mask_BS.reshape(-1).bool()
        for block in self.blocks:
            chosen = self.seen[block.layer].experts_TK[real_T].flatten()
            own_E = torch.bincount(chosen, minlength=block.n_experts)[: block.n_experts].float()
            self.own[block.layer] = self.own.get(block.layer, 0) + own_E

    def share(self) -> None:
        """Sums the counts of all processes."""
        self.counts = {layer: self.reduce(own_E) for layer, own_E in self.own.items()}

    def loss(self, mask_BS: Tensor) -> Tensor:
        """The recorded pass's part of the step's loss; without counts it is the whole step."""
        if not self.counts:
            self.count(mask_BS)
            self.share()
        real_T = mask_BS.reshape(-1).bool()
        losses = []
        for block in self.blocks:
            routing, total_E = self.seen[block.layer], self.counts[block.layer]
            alpha_TE = block.alpha(routing.logits_TE[real_T])
            sum_E = (alpha_TE / alpha_TE.sum(dim=-1, keepdim=True)).sum(dim=0)
            n_choices = total_E.sum()
            n_used = (routing.experts_TK[real_T] < block.n_experts).sum() / real_T.sum()
            mean_E = sum_E * n_used / n_choices  # K, or fewer where a rule leaves out experts
            losses.append(block.n_experts * (total_E / n_choices * mean_E).sum())
        self.seen = {}
        return torch.stack(losses).mean()


class HealTrainer(Trainer):
    """Trains adapters on rows in the order of `Rows`."""

    objective: objectives.Objective
    micro_batch: MicroBatch
    model: Any

    def __init__(
        self,
        moe: MoeModel,
        objective: objectives.Objective,
        teacher: objectives.Teacher | None,
        balance_weight: float,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.moe, self.objective, self.teacher = moe, objective, teacher
        self.projection = Projection(moe)
        self.n_processes: int = self.accelerator.num_processes
        self.balance_weight = balance_weight
        balance = Balance(moe.blocks, lambda t: self.accelerator.reduce(t, "sum"))
        self.balance = balance if balance_weight else None
        # Labels are shifted already, and counted over the global batch.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self.can_return_loss = True
        self.label_names = ["labels"]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SettingsError(
                "heal runs on one device or data-parallel: start it without FSDP and DeepSpeed"
            )

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """This process's share of a step, in micro-batches; leaves gradients in the weights."""
        self.model.train()
        batch = objectives.longest_first(self._prepare_inputs(inputs))
        n_items = self._n_items(batch, num_items_in_batch)
        is_shared = self.n_processes > 1

        def of_step(n_rows: int) -> Tensor:
            pieces = list(objectives.cut_rows(batch, n_rows))
            if self.balance is not None and not is_shared:
                self.balance.begin()  # a pass over all rows counts by itself
                if len(pieces) > 1:
                    self._count_loads(self.balance, pieces)
                    self.balance.share()
            return self._sum_losses(pieces, n_items)

        if self.balance is not None and is_shared:
            balance = self.balance
            self._within_memory(
                lambda n: self._count_loads(balance, objectives.cut_rows(batch, n)), batch
            )
            balance.share()
        loss = self._within_memory(of_step, batch)
        # Not by DistributedDataParallel: gradients are summed once all had enough memory.
        if is_shared:  # gradients are averaged, for losses are multiplied by the processes
            trained = [weight for weight in self.model.parameters() if weight.requires_grad]
            gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in trained]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for weight, part in zip(trained, flat.split([w.numel() for w in trained]), strict=True):
                weight.grad = part.view_as(weight).clone()
        return loss

    @torch.no_grad()
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss per trained position of the global batch, without gradients."""
        batch = objectives.longest_first(inputs)
        n_items = self._n_items(batch, num_items_in_batch)
        loss = self._within_memory(
            lambda n: self._sum_losses(objectives.cut_rows(batch, n), n_items), batch
        )
        return (loss, {"loss": loss}) if return_outputs else loss

    def _n_items(self, batch: Batch, n_items: Tensor | int | None) -> float:
        """The divisor of a sum of losses; the mean over processes is taken later."""
        if n_items is None:
            return max(1, int((batch["labels"] != objectives.IGNORED).sum()))
        return float(n_items) / self.n_processes

    def _sum_losses(self, pieces: Iterable[Batch], n_items: float) -> Tensor:
        """The loss of some micro-batches; their gradients too, where these are enabled."""
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for piece in pieces:
            # Before the student's pass, whose activations are kept for its gradients.
            at_BS = piece["labels"] != objectives.IGNORED
            taught = None if self.teacher is None else self.teacher(piece, at_BS)
            if self.balance is None or not self.model.training:
                loss = self._objective(self._hidden(piece), piece, taught) / n_items
            else:
                with self.balance.watching():
                    hidden_BSH = self._hidden(piece)
                loss = self._objective(hidden_BSH, piece, taught) / n_items
                balance = self.balance.loss(piece["attention_mask"])
                loss = loss + self.balance_weight * balance * self.n_processes
            if torch.is_grad_enabled():
                self.accelerator.backward(loss)
            total += loss.detach()
            trim()
        return total.float()

    def _hidden(self, batch: Batch) -> Tensor:
        trim()  # passes over rows of different lengths fragment memory
        hidden_BSH = self.projection.hidden(self.model, batch["input_ids"], batch["attention_mask"])
        trim()
        return hidden_BSH

    def _objective(self, hidden_BSH: Tensor, batch: Batch, taught: TopLogprobs | None) -> Tensor:
        at_BS = batch["labels"] != objectives.IGNORED
        next_M, weight_M = batch["labels"][at_BS], batch["weight_BS"][at_BS]

        def of_chunk(logits_NV: Tensor, at: slice) -> Tensor:
            loss_N = self.objective.loss(logits_NV, next_M[at], taught[at] if taught else None)
            return (loss_N * weight_M[at]).double().sum()

        return objectives.chunked_loss(self.projection, self.model, hidden_BSH[at_BS], of_chunk)

    @torch.no_grad()
    def _count_loads(self, balance: Balance, pieces: Iterable[Batch]) -> bool:
        """Passes that only count choices; they restore the random state."""
        before = states.random_states()
        balance.begin()
        for piece in pieces:
            with balance.watching():
                self._hidden(piece)
            balance.count(piece["attention_mask"])
        states.set_random_states(before)
        return True

    def _within_memory(self, work: Callable[[int], T], batch: Batch) -> T:
        """Work on a number of rows at once; halved in all processes when memory runs out."""
        before = states.random_states()
        while True:
            result = unless_out_of_memory(partial(work, self.micro_batch.rows))
            if self.n_processes > 1:  # every process must have had enough memory
                is_done = torch.tensor(float(result is not None), device=self.args.device)
                result = result if self.accelerator.reduce(is_done, "mean") == 1 else None
            if result is not None:
                return result
            self.model.zero_grad(set_to_none=True)
            self.micro_batch.halve(self.moe, batch["input_ids"].shape[1])
            states.set_random_states(before)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves the adapter only; Trainer would pickle its arguments too."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            states.save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(states.random_states(), self._random_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (file := self._random_file(checkpoint)).is_file():
            states.set_random_states(load_file(file))

    def _random_file(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.args.process_index}.safetensors"

    def _load_scaler(self, checkpoint: str | None) -> None:
        """No scaler: bfloat16 needs none, and float16 is not offered."""


@dataclass(frozen=True)
class Curve:
    """Losses of each step, and of the held-out rows by step."""

    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    best_step: int
    steps: int
    micro_batch: int


def fit(
    moe: MoeModel,
    model: Any,
    data: TrainingData,
    settings: HealSettings,
    objective: objectives.Objective,
    teacher: objectives.Teacher | None,
    *,
    folder: Path,
    report: Report,
    tell: Tell,
) -> Curve:
    """Trains adapters from the last state in `folder` on, and loads the best by held-out loss."""
    rows, held_out_rows = data.numbered_rows(settings.steps * settings.batch)
    weight = objective.answer_weight if settings.answer_weight is None else settings.answer_weight
    trainer = HealTrainer(
        moe, objective, teacher, settings.balance,
        model=model,
        args=_arguments(moe, settings, folder),
        train_dataset=rows,
        eval_dataset=held_out_rows,
        data_collator=objectives.Collator(objective.where, moe.tokenizer.pad_token_id or 0, weight),
        callbacks=[_Watch(settings, folder, report)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints
    chosen = choose_micro_batch(moe, model, trainer.projection, data, settings, folder)
    trainer.micro_batch = chosen
    tell(f"{settings.batch} rows a step, {chosen.rows} at once ({chosen.why})")
    with PartialState().main_process_first():  # it removes damaged states first
        state = states.last_usable(folder)
    if state is None or not states.is_over(state, settings):  # else stopped after its last step
        begin = None if state is None else str(states.state_folder(folder, state.global_step))
        with system_errors(folder):
            trainer.train(resume_from_checkpoint=begin)
        state = trainer.state
    best = states.best_step(state)
    trainer.accelerator.wait_for_everyone()  # until the first one has written the last state
    states.load_best(model, folder, best)
    trainer.accelerator.wait_for_everyone()  # until each has read the best adapters
    losses = (states.train_losses(state), states.held_out_losses(state))
    return Curve(*losses, best, state.global_step, chosen.rows)


def _arguments(moe: MoeModel, settings: HealSettings, folder: Path) -> TrainingArguments:
    # Trainer's batches are whole steps; HealTrainer cuts them, so that no state depends on it.
    share = share_of_process(settings.batch, settings.micro_batch)
    is_cuda = moe.device.type == "cuda"
    every = min(settings.check_every, settings.steps)
    recompute: dict[str, Any] = {}
    if settings.save_memory:  # transformers renamed these options
        names = ("activation_checkpointing", "gradient_checkpointing")
        name = next(n for n in names if n in TrainingArguments.__dataclass_fields__)
        recompute = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
        learning_rate=settings.rate(moe.model.config.get_text_config().hidden_size),
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=0.0,
        seed=settings.seed,
        bf16=is_cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not is_cuda,
        **recompute,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would report 0 instead
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=is_cuda,
        disable_tqdm=True,
        report_to="none",
    )
    # The model's device: Trainer would take the first of several, or all.
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else DataParallel: other batches, other hooks
    device, of_trainer = moe.device, arguments.device
    is_cpu = device.type == of_trainer.type == "cpu"  # CPUs are numbered by process
    if not is_cpu and device != of_trainer:
        raise SettingsError(
            f"--device {device}: training would run on {of_trainer}: omit --device, "
            "and choose a device by CUDA_VISIBLE_DEVICES"
        )
    return arguments


class _Watch(TrainerCallback):
    """Reports steps, stops when patience runs out or a loss is not finite, keeps two states."""

    def __init__(self, settings: HealSettings, folder: Path, report: Report) -> None:
        self.settings, self.folder, self.report = settings, folder, report

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.report(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Checks losses and norms before a state is written."""
        for name, what in (
            ("loss", "its loss"),
            ("grad_norm", "the norm of its gradient"),
            ("eval_loss", "the loss of held-out rows"),
        ):
            if not isfinite(value := more["logs"].get(name, 0.0)):
                raise ModelError(
                    f"training broke at step {state.global_step}: {what} is {value}: nothing is "
                    "written; name another --out and a lower --learning-rate, or --dtype float32"
                )

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop |= states.is_over(state, self.settings)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            states.keep_best_and_last(self.folder, states.best_step(state))
