"""README.md of a trained model: from what, on what, how, and whom to cite."""

import importlib.metadata
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_CITATIONS = {
    "vrpo": """@article{zhu2025llada15,
  title   = {LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models},
  author  = {Zhu, Fengqi and others},
  journal = {arXiv preprint arXiv:2505.19223},
  year    = {2025}
}""",
    "kto": """@inproceedings{ethayarajh2024kto,
  title     = {KTO: Model Alignment as Prospect Theoretic Optimization},
  author    = {Ethayarajh, Kawin and others},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}""",
    "sft": """@article{nie2025llada,
  title   = {Large Language Diffusion Models},
  author  = {Nie, Shen and others},
  journal = {arXiv preprint arXiv:2502.09992},
  year    = {2025}
}""",
}
_METHODS = {
    "vrpo": "A masked-diffusion language model, aligned by VRPO with the package `vrpo`.",
    "kto": "A masked-diffusion language model, aligned by KTO on ELBOs with the package `vrpo`.",
    "sft": "A masked-diffusion language model, fine-tuned with the package `vrpo`.",
}
_PACKAGES = ("vrpo", "torch", "transformers", "datasets", "peft")


def model_card(
    *,
    method: str,
    name: str,
    base_model: str | None,
    dataset: str | None,
    settings: dict[str, Any],
    metrics: dict[str, float],
    report: str | None = None,
    tags: list[str] | str = ("vrpo", "masked-diffusion"),
    license: str | None = None,
    language: str | list[str] | None = None,
) -> ModelCard:
    """The card; what is not known (a model built in memory, rows made in Python) is called so."""
    data = ModelCardData(
        base_model=base_model,
        datasets=[dataset] if dataset and "/" in dataset and not dataset.startswith((".", "/")) else None,
        library_name="vrpo",
        pipeline_tag="text-generation",
        tags=[tags] if isinstance(tags, str) else list(tags),
        license=license,
        language=language,
    )
    origin = f"`{base_model}`" if base_model else "a model built in memory"
    rows = f"`{dataset}`" if dataset else "rows given in Python"
    lines = [f"# {name}", "", f"{_METHODS[method]} It started from {origin} and was trained on {rows}.", ""]
    lines += ["Load it with `vrpo.models.load_model`, or after `import vrpo.models` with "]
    lines[-1] += "`AutoModelForCausalLM.from_pretrained`; answer with `vrpo generate`."
    lines += ["", "## Training", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in settings.items()]
    if report:
        lines += ["", f"Curves of the run: [{report}]({report})."]
    if metrics:
        lines += ["", "## Last evaluation", "", "| metric | value |", "|---|---|"]
        lines += [f"| {key} | {value:.6g} |" for key, value in metrics.items()]
    lines += ["", "Versions: " + ", ".join(_versions()), "", "## Citation", ""]
    lines += ["```bibtex", _CITATIONS[method], "```", ""]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _versions() -> list[str]:
    found = {
        package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()
    }
    return [f"{name} {found[name]}" for name in _PACKAGES if name in found]
