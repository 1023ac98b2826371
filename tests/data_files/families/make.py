"""Tiny random models of every family with what `transformers` computes for them; torch and transformers make these.

`python tests/data_files/families/make.py` writes, for each: the folder as `save_pretrained` leaves it (weights in
bfloat16), and in expected.safetensors rows of tokens, their float32 logits, and greedy continuations; in `reward/` a
reward model with the float32 scores of rows. Made with transformers 5.23 and torch 2.13; read by `test_families.py` and
`test_reward_folder.py` in `tests/models/`.
"""

import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0}
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "mistral": ("Mistral", {"sliding_window": 6, "rope_parameters": PLAIN}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"rope_parameters": PLAIN}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 1.5, "num_hidden_layers": 2}),
    "gemma3": (
        "Gemma3",
        GEMMA
        | {
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}
PROMPTS, LENGTH = (9, 4), 20  # tokens in each of two prompts; of a whole row


def draw(model, family: str) -> None:
    """Random weights of a size that makes every part of the model matter."""
    for parameter, values in model.named_parameters():
        noise = torch.randn(values.shape)
        if parameter.endswith("norm.weight"):
            noise = 0.3 * noise + (0 if family.startswith("Gemma") else 1)
        elif "embed_tokens" not in parameter and values.ndim == 2:
            noise *= values.shape[1] ** -0.5 * (2 if "q_proj" in parameter else 1)
        values.data = noise


def make(name: str, seed: int = 0) -> None:
    family, settings = FAMILIES[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**SIZES | settings)
    torch.manual_seed(seed)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class(config)
    draw(model, family)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    shards = {"max_shard_size": "6KB"} if name == "llama3" else {}
    model.bfloat16().save_pretrained(folder, **shards)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    tokens = torch.randint(2, config.vocab_size, (2, 2, LENGTH))
    for row, width in zip(tokens, PROMPTS, strict=True):
        row[1, :width] = row[0, :width]  # two completions of one prompt
    rows = tokens.flatten(0, 1)
    with torch.no_grad():
        expected = {"tokens": tokens, "logits": model(rows).logits.unflatten(0, (2, 2))}
        greedy, gaps = [], []
        for row, width in zip(tokens[:, 0], PROMPTS, strict=True):
            out = model.generate(
                row[None, :width],
                do_sample=False,
                max_new_tokens=LENGTH - 9,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            greedy.append(out.sequences[0, width:])
            best = torch.stack(out.logits)[:, 0].topk(2).values
            gaps.append((best[:, 0] - best[:, 1]).min().item())
    expected["greedy"] = torch.stack(greedy)
    if min(gaps) < 1e-2:  # the best two logits are too close to call in float32
        return make(name, seed + 1)
    print(f"{name}: seed {seed}, {sum(p.numel() for p in model.parameters()):,} numbers, smallest gap {min(gaps):.3f}")
    save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")


def make_reward(seed: int = 0) -> None:
    """A reward model; no row ends before its last token, which the score is read after."""
    folder = FOLDER / "reward"
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**SIZES, rope_parameters=PLAIN, tie_word_embeddings=True, num_labels=1)
    model = transformers.Qwen3ForSequenceClassification(config)
    draw(model, "Qwen3")
    model.bfloat16().save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rows = torch.randint(2, config.vocab_size, (4, LENGTH))
    with torch.no_grad():
        scores = model(rows).logits[:, 0]
    save_file({"tokens": rows, "scores": scores.contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    make_reward()
    for each in FAMILIES:
        make(each)
