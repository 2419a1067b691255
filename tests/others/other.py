"""What one release of transformers makes of exports. Runs in that release's environment; knows nothing of reverie-jax.

Reads jobs as JSON and writes their results, both by name:
- answer: a llava-hf folder and a picture: the ids of two prompts by its chat template, its pixels, 12 greedy tokens;
- original: an original LLaVA's folder and texts with <image>: their ids, as its loader's slow tokenizer gives them;
- save: a folder with a sentencepiece tokenizer: what this release saves of it, with the tokens that llava-hf adds.
"""

import json
import sys

import torch
import transformers
from PIL import Image

OLD = transformers.__version__ < "4.44"
"""Its LlavaProcessor takes no processor_config.json and has no chat template: its parts are used."""


def messages(talk):
    picture = [{"type": "image"}]
    return [
        {"role": "assistant" if n % 2 else "user", "content": picture * (n == 0) + [{"type": "text", "text": text}]}
        for n, text in enumerate(talk)
    ]


def answer(folder, picture, talk):
    if OLD:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt")
    else:
        processor = transformers.AutoProcessor.from_pretrained(folder)
    options = {"output_loading_info": True, "torch_dtype" if transformers.__version__ < "5" else "dtype": torch.float32}
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, **options)
    assert not any(info.values()), info
    ids = []
    for turns in (talk, talk[:1]):
        text = (tokenizer if OLD else processor).apply_chat_template(
            messages(turns), tokenize=False, add_generation_prompt=True
        )
        if OLD:
            inputs = {**tokenizer(text, return_tensors="pt"), **pixels}
        else:
            inputs = processor(text=text, images=Image.open(picture), return_tensors="pt")
        ids.insert(0, inputs["input_ids"][0].tolist())
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    tokens, pixels = out[0, len(ids[0]) :].tolist(), inputs["pixel_values"][0].tolist()
    return {"prompts": ids, "tokens": tokens, "pixels": pixels}


def original(folder, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)
    assert not tokenizer.is_fast
    found = []
    for text in texts:
        first, *rest = (tokenizer(part).input_ids for part in text.split("<image>"))
        found.append(first + [id for part in rest for id in (-1, *part[1:])])
    return found


def save(folder, out):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(transformers.AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer.save_pretrained(out)


with open(sys.argv[1]) as file:
    jobs = json.load(file)
results = {name: globals()[job.pop("do")](**job) for name, job in jobs.items()}
with open(sys.argv[2], "w") as file:
    json.dump(results, file)
