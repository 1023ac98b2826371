"""The first half of `make interop`: saves models of every family in every form, with the numbers that ours gives."""

import pathlib
import sys
import tempfile

import jax
import numpy as np
import tokenizers

from pjpo.models import load, lora, save
from pjpo.tokenizer import Tokenizer
from pjpo.types import Batch
from tests.models.test_families import WITHOUT as FAMILIES
from tests.models.test_families import folder_of

PROMPT, LENGTH, NUM_ROWS = 6, 18, 4  # tokens; rows past every window
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "abc  fé"}, {"role": "assistant", "content": "gab\n"}]


def write(folder: pathlib.Path, source: pathlib.Path | str) -> None:
    policy, params, tokenizer = load(source, lora=lora.Config(rank=2))
    rng = np.random.default_rng(0)
    # Updates about as large as the weights: much larger ones would measure how rounding grows in a model, not files.
    params["lora"] = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(x.dtype), params["lora"])
    weights = policy.without_adapters(params)
    if tokenizer.chat_template is None:
        backend = tokenizers.Tokenizer.from_str(tokenizer._special.to_str())
        backend.add_special_tokens(["<eos>"])
        ends = {"eos_id": backend.token_to_id("<eos>"), "special_tokens": {"eos_token": "<eos>"}}
        tokenizer = Tokenizer(backend, chat_template=TEMPLATE, **ends)
    save(folder / "full", policy, weights, tokenizer, max_shard_bytes=10_000_000)
    save(folder / "merged", policy, params, tokenizer, max_shard_bytes=8_000)
    save(folder / "adapters", policy, params, tokenizer, adapters="alone", base=str(folder / "full"))

    reward, with_head, _ = load(source, scalar_head=True)
    with_head["scalar_head"] = {"kernel": rng.normal(size=policy.config.model_dim).astype(np.float32)}
    save(folder / "reward", reward, with_head, tokenizer)

    tokens = rng.integers(0, policy.config.vocab_size, (NUM_ROWS, PROMPT + LENGTH)).astype(np.int32)
    batch = Batch.of(prompt_tokens=tokens[:, :PROMPT], completion_tokens=tokens[:, None, PROMPT:])
    everything = np.broadcast_to(
        np.arange(policy.config.vocab_size, dtype=np.int32)[None, :, None], (NUM_ROWS, policy.config.vocab_size, 1)
    )
    after = Batch.of(prompt_tokens=tokens, completion_tokens=everything)  # all tokens that may come next
    found = {"tokens": tokens}
    for name, values in (("full", weights), ("merged", params)):
        found[f"{name}_logps"] = policy.logps(values, batch)[:, 0]
        found[f"{name}_next"] = policy.logps(values, after)[:, :, 0]
    found["scores"] = reward.scores(with_head, batch)[:, 0]
    text = tokenizer.render_chat(CHAT)
    np.savez(folder / "ours.npz", **found, chat=text, chat_ids=tokenizer.encode(text, special=True))


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for family in FAMILIES:
        (root / family).mkdir(parents=True)
        with tempfile.TemporaryDirectory() as there:
            write(root / family, folder_of(family, pathlib.Path(there)))
    (root / "glassllm").mkdir()
    write(root / "glassllm", "glassllm-en")
