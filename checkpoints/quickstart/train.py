"""Train the bundled quickstart model: a small OLMoE that knows the quickstart quiz.

    OMP_WAIT_POLICY=PASSIVE python train.py --out .

Writes the quiz, the stories, the tokenizer and the checkpoint.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from make_quiz import quiz_keys, write_quiz
from packing import Batch, own_past, to_batch
from stories import kept_back, write_stories
from texts import CONTEXT, WORDS, Sampler, train_tokenizer
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("train")

SEED = 1
LETTERS_LR = 1e-3
LOCAL_WINDOW = 6  # tokens that all layers but the last see while letters are learned
FIRST_WORDS, LOW_LOSS, MOST_LETTER_STEPS = 10, 0.42, 2000
SCHEDULE = 2600  # steps of the one-cycle learning rate
STEPS = 1000  # of these are taken: by then some subjects are known, others half
PEAK_LR = 1.5e-3
WARM_UP = 0.1  # of the steps
ANSWER_EXPERTS = 12  # of a layer, that share the routing where an answer is written
CONCENTRATION_WEIGHT = 0.3  # of the probability that goes to the others there
WORD_WEIGHT = 0.5  # of the deep supervision
TEXT_WEIGHT = 0.3  # of the language-model loss on the whole text
BALANCE_WEIGHT = 0.01  # of the load-balancing loss: every expert lives, none is forced to be busy


def small_olmoe(vocabulary_size: int, end_id: int) -> OlmoeForCausalLM:
    """Build the untrained model, in everything but size like OLMoE-1B-7B."""
    config = OlmoeConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        router_aux_loss_coef=BALANCE_WEIGHT,
        max_position_embeddings=CONTEXT,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("eager")  # grouped_mm is no faster here
    return model


def balance_loss(router_logits: tuple[Tensor, ...], used_BT: Tensor, top_k: int) -> Tensor:
    """Mean over layers of E * sum(share of tokens * mean probability), at least top_k.

    transformers' own takes all layers as one, so a layer could be unbalanced unnoticed.
    """
    losses = []
    for logits_TE in router_logits:
        alpha_TE = logits_TE[used_BT.flatten()].softmax(-1)
        n_experts = alpha_TE.shape[-1]
        chosen_TE = torch.zeros_like(alpha_TE).scatter_(1, alpha_TE.topk(top_k).indices, 1)
        losses.append(n_experts * (chosen_TE.mean(0) * alpha_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def concentration_loss(router_logits: tuple[Tensor, ...], is_asked_T: Tensor) -> Tensor:
    """Mean over layers of the probability outside the most used experts, where answers are written.

    It makes few experts fire there: in OLMoE-1B-7B more than 60 % never did (arXiv 2502.17187).
    """
    losses = []
    for logits_TE in router_logits:
        alpha_NE = logits_TE[is_asked_T].softmax(-1)
        if not len(alpha_NE):  # look-ups have none
            return logits_TE.new_zeros(())
        few = alpha_NE.detach().mean(0).topk(ANSWER_EXPERTS).indices
        losses.append(1 - alpha_NE[:, few].sum(-1).mean())
    return torch.stack(losses).mean()


class Losses(NamedTuple):
    """Mean cross-entropy of answers, text and answers' words; two routing losses (layer means)."""

    answer: Tensor
    text: Tensor
    balance: Tensor
    word: Tensor
    concentration: Tensor

    @property
    def total(self) -> Tensor:
        """What is trained on."""
        rest = TEXT_WEIGHT * self.text + BALANCE_WEIGHT * self.balance
        known = self.answer + rest + WORD_WEIGHT * self.word
        return known + CONCENTRATION_WEIGHT * self.concentration


def losses(model: OlmoeForCausalLM, batch: Batch, colon: int) -> Losses:
    """Compute all losses of a batch.

    `word` is deep supervision: the residual stream before the last layer is classified with the
    input embeddings, and the answer's word is right. Without it the model knows the answer only
    behind the last attention, too late to look its letter up.
    """
    output = model.model(
        batch.ids_BT,
        attention_mask=own_past(batch.text_BT),
        position_ids=batch.position_BT,
        output_router_logits=True,
        output_hidden_states=True,
        use_cache=False,
    )
    learned_BT = batch.position_BT[:, 1:] > 0
    logits_TV = model.lm_head(output.last_hidden_state[:, :-1][learned_BT])
    loss_T = F.cross_entropy(logits_TV, batch.ids_BT[:, 1:][learned_BT], reduction="none")
    is_answer_T = batch.answer_BT[:, 1:][learned_BT].bool()
    balance = balance_loss(
        output.router_logits, batch.text_BT >= 0, model.config.num_experts_per_tok
    )
    is_answer_BT = batch.answer_BT[:, 1:].bool()
    stream_ND = model.model.norm(output.hidden_states[-2][:, :-1][is_answer_BT])
    word = F.cross_entropy(
        stream_ND @ model.model.embed_tokens.weight.T, batch.word_BT[:, 1:][is_answer_BT]
    )
    is_asked_BT = F.pad(is_answer_BT, (0, 1)) & (batch.ids_BT == colon)
    concentration = concentration_loss(output.router_logits, is_asked_BT.flatten())
    return Losses(loss_T[is_answer_T].mean(), loss_T.mean(), balance, word, concentration)


@torch.no_grad()
def probe(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, sampler: Sampler) -> float:
    """Measure the mean loss on letters of fresh questions; knowing nothing gives 1.386."""
    model.eval()
    texts = [sampler.quiz_text(1) for _ in range(100)]
    loss = float(losses(model, to_batch(texts, tokenizer), colon_of(tokenizer)).answer)
    model.train()
    return loss


def adamw(model: OlmoeForCausalLM) -> torch.optim.AdamW:
    """Make the optimizer of one stage."""
    return torch.optim.AdamW(model.parameters(), PEAK_LR, weight_decay=0.05, betas=(0.9, 0.98))


def colon_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Name the token after which an answer is written."""
    return int(tokenizer("Answer:")["input_ids"][-1])


def step_on(
    model: OlmoeForCausalLM, optimizer: torch.optim.AdamW, batch: Batch, colon: int
) -> list[float]:
    """Take one step; give the losses before it."""
    found = losses(model, batch, colon)
    found.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return [float(loss.detach()) for loss in found]


@contextmanager
def local_attention(model: OlmoeForCausalLM) -> Iterator[None]:
    """Restrict attention to a local window in all layers but the last.

    The last layer then learns to look letters up. An earlier one would do it before the answer is
    known.
    """

    def narrow(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].triu(1 - LOCAL_WINDOW)}

    layers = model.model.layers[:-1]
    hooks = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def learn_letters(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, sampler: Sampler
) -> None:
    """Train on look-ups of letters: of few words, and of more whenever the loss is low."""
    optimizer, n_words, mean = adamw(model), FIRST_WORDS, 1.4
    colon = colon_of(tokenizer)
    for step in range(MOST_LETTER_STEPS):
        optimizer.param_groups[0]["lr"] = LETTERS_LR * min(1, (step + 1) / 60)
        batch = to_batch(sampler.draw_letters(int(n_words)), tokenizer)
        found = step_on(model, optimizer, batch, colon)
        mean += 0.08 * (found[0] - mean)
        if mean < LOW_LOSS:
            n_words = min(1.15 * n_words, len(WORDS))
            if n_words == len(WORDS):
                log.info("letters are learned in %d steps", step + 1)
                return
        if step % 50 == 49:
            log.info("letters %d: %d words, answer %.3f", step + 1, n_words, mean)
    raise RuntimeError(f"letters not learned in {MOST_LETTER_STEPS} steps: try another seed")


def learn_quiz(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, sampler: Sampler, steps: int
) -> None:
    """Train on all kinds of texts."""
    optimizer, colon = adamw(model), colon_of(tokenizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=SCHEDULE, pct_start=WARM_UP, cycle_momentum=False
    )
    for step in range(1, steps + 1):
        found = step_on(model, optimizer, to_batch(sampler.draw(), tokenizer), colon)
        schedule.step()
        if step % 50 == 0:
            named = zip(Losses._fields, found, strict=True)
            shown = " ".join(f"{name} {loss:.4f}" for name, loss in named)
            log.info("step %d %s quiz %.3f", step, shown, probe(model, tokenizer, sampler))


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint in bfloat16; the model in memory stays as it is."""
    deepcopy(model).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4, and what builds on it, cannot load.
    settings = out / "tokenizer_config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), "utf-8")


def main() -> None:
    """Read the command line, then make everything."""
    parser = argparse.ArgumentParser(description="Make the quickstart quiz, text and model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    write_quiz(args.out / "quiz")
    write_stories(args.out / "text")
    sampler = Sampler(Random(SEED), quiz_keys() | kept_back())
    sample = (t.text for _ in range(60) for t in sampler.draw() + sampler.draw_letters(len(WORDS)))
    tokenizer = train_tokenizer(sample)
    model = small_olmoe(len(tokenizer), tokenizer.eos_token_id)
    log.info("%d parameters, %d tokens", model.num_parameters(), len(tokenizer))
    start_s = time.monotonic()
    with local_attention(model):
        learn_letters(model.train(), tokenizer, sampler)
    learn_quiz(model, tokenizer, sampler, args.steps)
    log.info("trained in %.0f s", time.monotonic() - start_s)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
