"""Whether the engine of this run can go on from a checkpoint: which engine wrote it, for how many processes.

Checkpoints of DDP and of one process are whole, FSDP2's are read by any number of processes. DeepSpeed keeps
a part of the optimizer's state for each process: for another number it has a form that it calls universal.
"""

from pathlib import Path

_NAMES = {"plain": "one process or DDP", "fsdp": "FSDP", "deepspeed": "DeepSpeed"}


def engine_of(folder: Path) -> str | None:
    """Which engine wrote the optimizer's state: "plain", "fsdp" or "deepspeed"; None without a state."""
    if (folder / "latest").is_file():
        return "deepspeed"
    if (folder / "optimizer.bin").is_file() or (folder / "optimizer_0").is_dir():
        return "fsdp"
    return "plain" if (folder / "optimizer.pt").is_file() else None


def check_engine_of(folder: Path, engine: str) -> None:
    """ValueError where another engine wrote the optimizer's state, which `engine` cannot read."""
    found = engine_of(folder)
    if found is not None and found != engine:
        raise ValueError(
            f"resume_from_checkpoint: {folder} was written under {_NAMES[found]}, and this run is under "
            f"{_NAMES[engine]}, which cannot read its optimizer's state. Go on under {_NAMES[found]}, or "
            "start a new run from the weights that it holds"
        )


def check_zero_checkpoint(
    folder: Path, *, world_size: int, stage: int, is_universal: bool, loads_best: bool
) -> None:
    """ValueError unless DeepSpeed can go on from the checkpoint with so many processes.

    is_universal: the configuration of DeepSpeed says checkpoint.load_universal.
    loads_best: load_best_model_at_end, which would then look for a universal form of the best checkpoint.
    """
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    written = len(list((folder / tag).glob("*_optim_states.pt")))
    in_parts = any((folder / tag).glob("zero_pp_rank_*_model_states.pt"))
    if in_parts != (stage == 3):
        found = "ZeRO-3" if in_parts else "a lower stage of ZeRO than 3"
        raise ValueError(
            f"resume_from_checkpoint: {folder} was written under {found}, and this run is under "
            f"ZeRO-{stage}, which keeps its state in another form: go on under the stage that wrote it"
        )
    universal = f"{tag}_universal"
    convert = (
        "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder "
        f"{folder / tag} --output_folder {folder / universal}"
    )
    if not is_universal and written != world_size:
        raise ValueError(
            f"resume_from_checkpoint: {folder} was written by {written} processes under DeepSpeed, which "
            f"keeps a part of the optimizer's state for each, and this run has {world_size}. Launch "
            f'{written} processes, or convert it ({convert}) and set "checkpoint": {{"load_universal": '
            "true} in the DeepSpeed configuration"
        )
    if is_universal and not (folder / "latest_universal").is_file():
        raise ValueError(
            f'resume_from_checkpoint: the DeepSpeed configuration says "load_universal", and {folder} has no '
            f"universal form: leave it out with {written} processes, or convert the checkpoint ({convert})"
        )
    if is_universal and loads_best:
        raise ValueError(
            'load_best_model_at_end does not go with "load_universal" in the DeepSpeed configuration: the '
            "best checkpoint will have no universal form. Set it to false"
        )
