"""The second half of `make interop`: the saved folders in `transformers` and PEFT, number by number; needs torch.

Log-probs are compared, of all tokens that may come next among them: the logits less a constant for each position.
"""

import json
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers

BOUND = 1e-4  # nats
CHAT = [{"role": "user", "content": "abc  fé"}, {"role": "assistant", "content": "gab\n"}]


def differences(model, ours, name):
    """The largest one among log-probs of the rows' tokens, and of every token that may come next."""
    tokens = torch.tensor(ours["tokens"], dtype=torch.int64)
    with torch.no_grad():
        logps = model.eval()(tokens).logits.log_softmax(-1).numpy()
    rows = np.take_along_axis(logps[:, :-1], ours["tokens"][:, 1:, None], -1)[..., 0]
    rows = rows[:, -ours[f"{name}_logps"].shape[1] :]
    return np.abs(rows - ours[f"{name}_logps"]).max(), np.abs(logps[:, -1] - ours[f"{name}_next"]).max()


def difference_of_scores(folder, ours):
    """Row by row: padding is looked for by its id, which these random rows hold too."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "pad_token_id": None}
    model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(map(len, loaded.values())), loaded
    with torch.no_grad():
        rows = torch.tensor(ours["tokens"], dtype=torch.int64)[:, None]
        scores = [model.eval()(row).logits.item() for row in rows]
    return np.abs(scores - ours["scores"]).max()


def check(folder):
    ours = np.load(folder / "ours.npz")
    make = transformers.AutoModelForCausalLM.from_pretrained
    full = make(folder / "full", dtype=torch.float32, attn_implementation="eager")
    found = {
        "full": differences(full, ours, "full"),
        "merged": differences(
            make(folder / "merged", dtype=torch.float32, attn_implementation="eager"), ours, "merged"
        ),
        "adapters": differences(peft.PeftModel.from_pretrained(full, folder / "adapters"), ours, "merged"),
    }
    for kind in found:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / kind)
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == str(ours["chat"]), folder
        assert tokenizer(str(ours["chat"]), add_special_tokens=False)["input_ids"] == ours["chat_ids"].tolist(), folder
    ends = json.loads((folder / "full" / "generation_config.json").read_text())["eos_token_id"]
    assert full.generation_config.eos_token_id == ends
    found["reward"] = (difference_of_scores(folder / "reward", ours),)
    return found


if __name__ == "__main__":
    worst = 0.0
    print(
        f"{'':10}{'full':>20}{'merged':>20}{'adapters':>20}{'reward':>10}  largest difference: rows, next token; scores"
    )
    for folder in sorted(path.parent for path in pathlib.Path(sys.argv[1]).glob("*/ours.npz")):
        found = check(folder)
        print(f"{folder.name:10}" + "".join(f"{value:>10.1e}" for pair in found.values() for value in pair))
        worst = max(worst, *(value for pair in found.values() for value in pair))
    if not worst < BOUND:
        raise SystemExit(f"differs by {worst:.1e} nats, allowed {BOUND:.0e}")
