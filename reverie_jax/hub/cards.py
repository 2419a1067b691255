"""Cards of models and datasets, with evaluation results in the forms that the hub reads."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from reverie_jax.errors import UserError
from reverie_jax.files import read_json
from reverie_jax.hub.repository import HubError, reason

README = "README.md"
_LIBRARIES = {"llava-hf": "transformers", "peft": "peft", "orbax": "reverie-jax"}
"""Library that opens a format, where the hub knows it or it is this one."""
_USAGE = {
    "llava-hf": '`LlavaForConditionalGeneration.from_pretrained("{name}")` in transformers, or vLLM.',
    "llava": 'original LLaVA\'s `load_pretrained_model("{name}", None, …)`.',
    "peft": '`PeftModel.from_pretrained(base, "{name}")` on `LlavaForConditionalGeneration`.',
    "llava-lora": 'original LLaVA\'s `load_pretrained_model("{name}", base, …)`; its name must contain llava and lora.',
    "original": "its authors' code: names and shapes are theirs; MiniGPT-4's code reads four files instead.",
    "orbax": "reverie-jax only.",
}
_HERE = "path/to/this/folder"
_RESULTS = "Evaluation"
_MAX_METRICS = 16
"""Metrics of a benchmark on a card; scores.json has all of them."""
_log = logging.getLogger(__name__)


def write_model_card(
    folder: Path, to: str, system: str, table: Mapping[str, str], *, base_models: Sequence[str], recipe: str = ""
) -> None:
    """Write the card of a model or of adapters.

    Args:
        folder: Of the model's files.
        to: Their format.
        system: Of the model: llava, or a sister system.
        table: What is known about them.
        base_models: Repositories on the hub that it was made from.
        recipe: Of its training, as YAML.
    """
    from huggingface_hub import ModelCardData

    adapters = to in ("peft", "llava-lora")
    bases: str | list[str] | None = list(base_models) if len(base_models) > 1 else next(iter(base_models), None)
    relation: Any = {"base_model_relation": "adapter"} if adapters and bases else {}
    data = ModelCardData(
        base_model=bases,
        library_name=_LIBRARIES.get(to),
        pipeline_tag="image-text-to-text",
        tags=["reverie-jax", system, *(["lora"] if adapters else [])],
        **relation,
    )
    usage = _USAGE[to].format(name=_HERE)
    if to == "peft" and system != "llava":
        usage = usage.replace("`LlavaForConditionalGeneration`", "its authors' class")
    lines = [f"# {'LoRA adapters' if adapters else 'Model'} ({to})", "", f"Loads with {usage}", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in table.items()), ""]
    if recipe:
        lines += ["## Recipe", "", "Trained with `reverie train`:", "", "```yaml", recipe.rstrip(), "```", ""]
    _write(folder, data, "\n".join(lines))


def write_dataset_card(folder: Path, counts: Mapping[str, int], sources: Mapping[str, Any]) -> None:
    """Write the card of records as a dataset.

    Args:
        folder: Of the dataset.
        counts: Of `datasets.write_parquet`.
        sources: What the records were built from, of `datasets.read_sources`.
    """
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        task_categories=["image-text-to-text"],
        size_categories=_size_category(counts["images"] + counts["texts without an image"]),
        source_datasets=list(sources.get("datasets", ())) or None,
        tags=["reverie-jax"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    names = ", ".join(f"`{name}`" for name in sources.get("sources", ())) or "not recorded"
    lines = ["# Conversations about images", "", "A row is an image with all conversations about it.", ""]
    rows = {name: f"{count:,}" for name, count in counts.items()} | {"from": names}
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    lines += [
        "`weight` is an answer's loss weight, `prefix` what it begins with without loss, `kind` the rationale's kind or"
    ]
    lines += ["the side of a preference `pair`. `reverie data build hub:OWNER/NAME --out records/` reads it.", ""]
    _write(folder, data, "\n".join(lines))


def _size_category(count: int) -> str:
    """Return the hub's name of a number of rows."""
    bounds = {10**3: "1K", 10**4: "10K", 10**5: "100K", 10**6: "1M", 10**7: "10M"}
    lower = ""
    for bound, name in bounds.items():
        if count < bound:
            return f"{lower}<n<{name}" if lower else f"n<{name}"
        lower = name
    return f"n>{lower}"


def base_licence(folder: Path) -> dict[str, str]:
    """Return the licence of the one base model of a card that states none, in the fields of the card's metadata.

    Nothing is returned where the hub does not say it: a card without a licence is better than a wrong one.
    """
    from huggingface_hub import HfApi, ModelCard

    with contextlib.suppress(Exception):  # a broken card is an error of `update_card`
        data = ModelCard((folder / README).read_text("utf-8")).data
        if data.get("license") is None and isinstance(data.get("base_model"), str):
            base = HfApi().model_info(data["base_model"]).card_data
            found = {name: getattr(base, name, None) for name in ("license", "license_name", "license_link")}
            return {name: value for name, value in found.items() if value}
    return {}


def update_card(folder: Path, fields: Mapping[str, Any], scores: Sequence[Path], repository: str) -> None:
    """Set fields of a model's or dataset's card, and write the results of evaluations into it.

    They are in the table of the card, with intervals, in its `model-index`, and in a file of `.eval_results` where the
    questions were a dataset that is a benchmark of the hub.

    Args:
        folder: The folder with the card.
        fields: Of the card's metadata.
        scores: Files as `reverie score` writes them, or folders with a scores.json. The card keeps its own results if there
            are none.
        repository: owner/name, which the card names from then on.

    Raises:
        UserError: A file is not one of scores, or the card cannot be read.
        HubError: The hub cannot be asked whether a dataset is a benchmark.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / README
    try:
        card = ModelCard(path.read_text("utf-8") if path.exists() else "---\n---\n")
        metadata: Any = {**card.data.to_dict(), **fields}  # type: ignore[no-untyped-call]
        data = ModelCardData(**metadata)
    except Exception as error:  # YAML's and the hub client's
        raise UserError(f"{path}: its metadata cannot be read ({reason(error)})") from None
    text = card.text.replace(_HERE, repository)
    if scores:
        results = [_read_score(score) for score in scores]
        data.model_name = repository.rpartition("/")[2]
        data.eval_results = [each for score in results for each in _eval_results(score)]
        text = re.sub(rf"\n## {_RESULTS}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
        text = text.rstrip() + "\n\n" + "\n".join(_results_table(results)) + "\n"
        _write_eval_results(folder / ".eval_results", results)
    _write(folder, data, text.lstrip("\n"))


def _write(folder: Path, data: Any, text: str) -> None:
    (folder / README).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", "utf-8")


def _read_score(path: Path) -> dict[str, Any]:
    """Return the content of a scores.json.

    Raises:
        UserError: It is none.
    """
    path = path / "scores.json" if path.is_dir() else path
    content = read_json(path)
    kinds = {"benchmark": str, "rule": str, "metrics": dict, "intervals": dict, "protocol": dict, "items": int}
    whole = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    if not whole or not content["metrics"]:
        raise UserError(f"{path}: not a file of scores; `reverie score --out FOLDER` or `reverie eval` writes one")
    return content


def _shown(score: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return (metric, value, interval) of a score's first metrics."""
    rows = []
    for name, value in list(score["metrics"].items())[:_MAX_METRICS]:
        low, high = score["intervals"].get(name, (None, None))
        rows.append((name, value, "" if low is None else f"{low:.4g} to {high:.4g}"))
    return rows


def _dataset(score: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return (repository, commit) of the dataset on the hub that the questions come from; empty for official files."""
    repository, _, commit = str(score["protocol"].get("hub", "")).partition("@")
    return repository, commit or None


def _eval_results(score: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    repository, commit = _dataset(score)
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=repository or score["benchmark"],
            dataset_name=score["benchmark"],
            dataset_revision=commit,
            metric_type=name,
            metric_value=value,
            metric_name=f"{name} by rule {score['rule']}" + (f", 95 % interval {interval}" if interval else ""),
        )
        for name, value, interval in _shown(score)
    ]


def _results_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"## {_RESULTS}",
        "",
        "| benchmark | rule | questions | metric | value | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for score in results:
        start = f"| {score['benchmark']} | {score['rule']} | {score['items']:,} |"
        lines += [f"{start} {name} | {value:.4g} | {interval} |" for name, value, interval in _shown(score)]
        if more := max(0, len(score["metrics"]) - _MAX_METRICS):
            lines.append(f"{start} {more} more | | |")
    return [*lines, "", "Intervals are of a bootstrap over images or other clusters of questions."]


def _write_eval_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the headline of each score on a benchmark of the hub, in the form of its leaderboards."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    for old in folder.glob("*.yaml") if folder.exists() else ():
        old.unlink()
    for score in results:
        repository, commit = _dataset(score)
        task = _task(repository, score["benchmark"]) if repository else ""
        if not task:
            _log.info("%s: not asked on a benchmark of the hub: the result is on the card only", score["benchmark"])
            continue
        name, value, interval = _shown(score)[0]
        notes = f"{name}, rule {score['rule']}" + (f", 95 % interval {interval}" if interval else "")
        entry = EvalResultEntry(repository, task, value, dataset_revision=commit, notes=notes)
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        (folder / f"{score['benchmark']}-{score['rule']}.yaml").write_text(text, "utf-8")


def _task(repository: str, benchmark: str) -> str:
    """Return the task of a dataset that is a benchmark of the hub: its only one, or that of the benchmark's name.

    Raises:
        HubError: The hub cannot be asked.
    """
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = huggingface_hub.hf_hub_download(repository, "eval.yaml", repo_type="dataset")
        tasks = [str(task["id"]) for task in yaml.safe_load(Path(path).read_text("utf-8"))["tasks"]]
    except (RemoteEntryNotFoundError, KeyError, TypeError, yaml.YAMLError):
        return ""
    except Exception as error:
        raise HubError(f"datasets/{repository}: eval.yaml cannot be read ({reason(error)})") from None
    return next((task for task in tasks if len(tasks) == 1 or task == benchmark), "")
