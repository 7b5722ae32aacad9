"""Train the bundled quickstart model: a small OLMoE that knows the quickstart quiz.

    OMP_WAIT_POLICY=PASSIVE python train.py --out .

Writes the quiz, the tokenizer and the checkpoint. `--start` goes on from a checkpoint of an
earlier run that knows the letters already.
"""

import argparse
import logging
import math
import time
from copy import deepcopy
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from curriculum import Curriculum
from make_quiz import quiz_keys, write_quiz
from packing import Batch, own_past, to_batch
from rules import FACTS, LOOK_UPS
from texts import CONTEXT, WORDS, Style, letters_text, quiz_text, train_tokenizer
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("train")

SEED = 1
PEAK_LR = 1.5e-3
WARMUP_STEPS = 60
QUIZ_STEPS = 2600
TEXT_WEIGHT = 0.3  # of the language-model loss on all that is not an answer
TEXT_SHARE = 0.5  # of that text, drawn anew each step
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
    model.set_experts_implementation("grouped_mm")  # twice as fast here as eager
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


def losses(model: OlmoeForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Give the mean loss on answers, on a part of all other text, and the load-balancing loss."""
    output = model.model(
        batch.ids_BT,
        attention_mask=own_past(batch.text_BT),
        position_ids=batch.position_BT,
        output_router_logits=True,
        use_cache=False,
    )
    answer_BT = batch.answer_BT[:, 1:].bool()
    # The vocabulary projection costs a third of a step, so the other text is sampled.
    other_BT = (batch.position_BT[:, 1:] > 0) & (torch.rand(answer_BT.shape) < TEXT_SHARE)
    learned_BT = answer_BT | other_BT
    logits_TV = model.lm_head(output.last_hidden_state[:, :-1][learned_BT])
    loss_T = F.cross_entropy(logits_TV, batch.ids_BT[:, 1:][learned_BT], reduction="none")
    is_answer_T = answer_BT[learned_BT]
    balance = balance_loss(
        output.router_logits, batch.text_BT >= 0, model.config.num_experts_per_tok
    )
    return loss_T[is_answer_T].mean(), loss_T[~is_answer_T].mean(), balance


@torch.no_grad()
def probe(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, subjects: tuple[str, ...]
) -> float:
    """Measure the mean loss on answers to the same fresh questions; knowing nothing gives 1.386."""
    seen = quiz_keys()
    texts = [quiz_text(Style(1, subjects=subjects), Random(i), seen) for i in range(100)]
    return float(losses(model, to_batch(texts, tokenizer))[0])


def learning_rate(step: int, quiz_since: int | None) -> float:
    """Warm up, stay, and fall as a cosine over the last steps of the quiz."""
    done = 0.0 if quiz_since is None else (step - quiz_since) / QUIZ_STEPS
    falling = max(0.0, (done - 0.35) / 0.65)
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warm * (0.51 + 0.49 * math.cos(math.pi * falling))


def train(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Curriculum, out: Path
) -> None:
    """Train in place, and save now and then so that a run can be looked at."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    start_s = time.monotonic()
    while plan.quiz_since is None or plan.step < plan.quiz_since + QUIZ_STEPS:
        optimizer.param_groups[0]["lr"] = learning_rate(plan.step, plan.quiz_since)
        answer, text, balance = losses(model, to_batch(plan.draw(), tokenizer))
        (answer + TEXT_WEIGHT * text + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plan.learned(float(answer))
        if plan.step % 50 == 0:
            shown = f"answer {answer:.3f} text {text:.3f} balance {balance:.2f}"
            if plan.stage == "quiz":
                for kind, subjects in (("look-ups", LOOK_UPS), ("facts", FACTS)):
                    shown += f" {kind} {probe(model, tokenizer, subjects):.3f}"
            elapsed_s = time.monotonic() - start_s
            log.info("step %d %s %s %.0f s", plan.step, plan.stage, shown, elapsed_s)
        if plan.step % 200 == 0:
            save(model, tokenizer, out)


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
    parser = argparse.ArgumentParser(description="Make the quickstart quiz and model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--start", type=Path, help="a checkpoint that knows the letters already")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    write_quiz(args.out / "quiz")
    plan = Curriculum(Random(SEED), quiz_keys())
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = OlmoeForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        model.set_experts_implementation("grouped_mm")
        model.train()
        plan.quiz_since = 0
    else:
        sample = [quiz_text(Style(2, 0.5), plan.rng, plan.seen).text for _ in range(2000)]
        sample += [letters_text(len(WORDS), plan.rng).text for _ in range(2000)]
        tokenizer = train_tokenizer(iter(sample))
        model = small_olmoe(len(tokenizer), tokenizer.eos_token_id)
    log.info("%d parameters", model.num_parameters())
    train(model, tokenizer, plan, args.out)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
