"""What an exported model must do where only torch, transformers, safetensors and sentencepiece are installed.

A program of its own: `python fresh.py FOLDER` reads every export NAME in FOLDER and, beside it, NAME.safetensors
(tokens and their logits), and prints what it found as JSON. It imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

CODE = {"trust_remote_code": True}
PROJECT = ("model", "pretrain", "data_prep", "common", "deepspeed", "megatron", "pydantic")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def check(folder: Path) -> dict[str, Any]:
    """Of one export: differences of logits, and whether generation with the cache gives what it gives without."""
    expected = load_file(folder.with_name(f"{folder.name}.safetensors"))
    tokens, logits = expected["tokens"], expected["logits"]
    model = AutoModelForCausalLM.from_pretrained(folder, **CODE).eval()
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **CODE).eval()
    found: dict[str, Any] = {"type": AutoConfig.from_pretrained(folder, **CODE).model_type}
    with torch.no_grad():
        found["sdpa"] = difference(model(tokens).logits, logits)
        found["eager"] = difference(eager(tokens).logits, logits)
        base = AutoModel.from_pretrained(folder, **CODE).eval()
        found["hidden"] = difference(model.head(base(tokens).last_hidden_state), logits)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        found["compiled"] = difference(compiled(tokens, use_cache=False).logits, logits)
    prompt, settings = tokens[:, :5], {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0  # padding on the left
    cached = model.generate(prompt, attention_mask=mask, **settings)
    uncached = model.generate(prompt, attention_mask=mask, use_cache=False, **settings)
    beams = model.generate(prompt, attention_mask=mask, num_beams=2, **settings)
    found["generate"] = bool((cached == uncached).all()) and cached.shape == beams.shape == (len(tokens), 25)
    return found


def train(folder: Path) -> list[float]:
    """The losses of three steps of Trainer, by checkpointed blocks; needs accelerate."""
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder, **CODE)
    tokens = load_file(folder.with_name(f"{folder.name}.safetensors"))["tokens"]
    rows = [{"input_ids": row, "labels": row} for row in tokens] * 4
    settings = TrainingArguments(
        output_dir=str(folder.with_name("trained")),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        gradient_checkpointing=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, **CODE)  # to be saved with the model
    trainer = Trainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder.with_name("tuned")))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tokenize(folder: Path, documents: Path) -> dict[str, Any]:
    """Ids of all documents as a list, and how many texts do not come back."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **CODE)
    texts = json.loads(documents.read_text())
    ids = tokenizer(texts)["input_ids"]
    lost = sum(tokenizer.decode(numbers) != text for numbers, text in zip(ids, texts, strict=True))
    batch = tokenizer(texts[:2], padding=True, return_tensors="pt", truncation=True, max_length=50)
    return {"ids": ids, "lost": lost, "padding": int((batch["attention_mask"] == 0).sum())}


def main(place: Path) -> dict[str, Any]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folders = sorted(path for path in place.iterdir() if path.with_name(f"{path.name}.safetensors").exists())
    found: dict[str, Any] = {path.name: check(path) for path in folders}
    if (place / "documents.json").exists():
        (place / "tokenized.json").write_text(json.dumps(tokenize(folders[0], place / "documents.json")))
    if "--train" in sys.argv:
        found["losses"] = {path.name: train(path) for path in folders[:1]}
    found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["project"] = [name for name in PROJECT if name in sys.modules]
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
