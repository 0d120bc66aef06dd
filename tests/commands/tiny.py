"""Command lines on tiny models, and the one line that a failing command prints."""

from vrpo.commands.main import main

SIZES = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64}


def train_flags(files, model_path, output, *more):
    return [
        "train",
        f"--model_name_or_path={model_path}",
        f"--dataset_name={files / 'pairs.jsonl'}",
        f"--output_dir={output}",
        "--max_steps=2",
        "--num_samples=2",
        "--max_length=64",
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=1",
        "--learning_rate=1e-2",
        "--warmup_steps=0",
        "--use_cpu",
        "--disable_tqdm=true",
        "--training_report=false",
        *more,
    ]


def score_flags(files, model_path, output, *more):
    return [
        "score",
        f"--model_name_or_path={model_path}",
        f"--dataset_name={files / 'pairs.jsonl'}",
        f"--output_file={output}",
        "--num_samples=2",
        "--max_length=64",
        "--device=cpu",
        *more,
    ]


def variance_flags(files, model_path, output, *more):
    return [
        "variance",
        f"--model_name_or_path={model_path}",
        f"--ref_model_name_or_path={model_path}",
        f"--dataset_name={files / 'pairs.jsonl'}",
        f"--output_file={output}",
        "--designs=balanced",
        "--num_samples=2",
        "--num_pairs=2",
        "--num_repeats=2",
        "--max_length=64",
        "--device=cpu",
        *more,
    ]


def generate_flags(files, model_path, output, *more):
    return [
        "generate",
        f"--model_name_or_path={model_path}",
        f"--output_file={output}",
        "--max_new_tokens=8",
        "--steps=1",
        "--device=cpu",
        *more,
    ]


def error_of(capsys, argv):
    """The one line that a failing command prints."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vrpo: error: ")
    return lines[-1]
