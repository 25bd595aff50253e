"""The demo's world: reverse a string of digits. Tokenizer, Qwen2-shaped model, data, verified reward, warm start."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DIGITS = 6
SLIP = 0.4  # how often the warm start's teacher writes a random digit instead of the right one
PAD, EOS, EQUALS = "<pad>", "<eos>", "="
COMPLETION_LENGTH = DIGITS + 2  # the answer, <eos>, and room to be wrong


def make_tokenizer():
    """A word-level tokenizer over the ten digits, built here: nothing is downloaded."""
    words = [PAD, EOS, EQUALS, *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD, padding_side="left"
    )


def make_model(tokenizer, hidden_size=128, layers=2):
    """A randomly initialised Qwen2: the architecture is the real one, only the sizes are small."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def make_rows(count, seed):
    """`count` rows {"prompt": "3 1 4 =", "answer": "4 1 3"}, the same for the same seed."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        digits = [str(generator.randrange(10)) for _ in range(DIGITS)]
        rows.append({"prompt": " ".join([*digits, EQUALS]), "answer": " ".join(reversed(digits))})
    return rows


def reward(completions, answer, **_):
    """Fraction of digits in their right place; missing and surplus digits count as wrong. TRL calls this."""
    scores = []
    for completion, expected in zip(completions, answer, strict=True):
        got, want = completion.split(), expected.split()
        scores.append(sum(g == w for g, w in zip(got, want)) / max(len(got), len(want)))
    return scores


def exact(completions, answer, **_):
    """1 where the whole answer is right. Logged by TRL, not trained on (its reward weight is 0)."""
    return [float(completion.split() == expected.split()) for completion, expected in zip(completions, answer)]


def warm_start(model, tokenizer, steps, seed, batch_size=128, lr=1e-3):
    """A short supervised run on a sloppy teacher: GRPO needs a policy that is right sometimes, and room above it.

    Yields:
        The loss of each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    rows, slips = make_rows(steps * batch_size, seed), random.Random(seed)
    model.train()
    for start in range(0, len(rows), batch_size):
        texts = [f"{row['prompt']} {_sloppy(row['answer'], slips)} {EOS}" for row in rows[start : start + batch_size]]
        tokens = tokenizer(texts, return_tensors="pt")["input_ids"]
        logits = model(input_ids=tokens).logits[:, DIGITS:-1]  # the positions that predict the answer and <eos>
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, DIGITS + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def _sloppy(answer, generator):
    digits = answer.split()
    return " ".join(str(generator.randrange(10)) if generator.random() < SLIP else digit for digit in digits)


@torch.no_grad()
def evaluate(model, tokenizer, seed, count=256):
    """Greedy answers to held-out prompts: (mean reward, share answered exactly)."""
    rows = make_rows(count, seed)
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", return_token_type_ids=False)
    model.eval()
    tokens = model.generate(**prompts, max_new_tokens=COMPLETION_LENGTH, do_sample=False)
    answers = [row["answer"] for row in rows]
    completions = tokenizer.batch_decode(tokens[:, DIGITS + 1 :], skip_special_tokens=True)
    return sum(reward(completions, answers)) / count, sum(exact(completions, answers)) / count
