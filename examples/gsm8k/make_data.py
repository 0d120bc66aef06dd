"""The three files of this recipe from OpenAI's grade-school-math (MIT licence, arXiv 2110.14168).

    git clone https://github.com/openai/grade-school-math
    python examples/gsm8k/make_data.py grade-school-math data/gsm8k
    vrpo sft --config examples/gsm8k/sft.yaml --dataset_name data/gsm8k/sft.jsonl

- sft.jsonl: the training problems and their reference solutions.
- preferences_{train,test}.jsonl: of the test problems, for which the repository has solutions by four models.
  Each wrong one is the rejected answer of a pair; chosen is a model's correct one, else the reference
  solution. A problem's pairs stay together: every eighth problem that has pairs goes to the second file.

Calculator annotations (`<<3*4=12>>`) are taken out, and the last line is `A: number` throughout. The run in
results.md used a subset of such pairs, so figures will differ a little.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
_TEST_EVERY = 8


def clean(solution: str) -> str:
    """Without calculator annotations; `#### 12` and `A: 12` become `A: 12`."""
    return re.sub(r"^#### *", "A: ", re.sub(r"<<.*?>>", "", solution), flags=re.MULTILINE).strip()


def pairs(problem: dict) -> list[dict[str, str]]:
    """Each wrong solution of a problem against the first correct one."""
    solutions = [problem[name] for name in _MODELS]
    right = [one["solution"] for one in solutions if one["is_correct"]]
    chosen = clean((right or [problem["ground_truth"]])[0])
    wrong = dict.fromkeys(clean(one["solution"]) for one in solutions if not one["is_correct"])
    return [
        {"prompt": problem["question"], "chosen": chosen, "rejected": rejected}
        for rejected in wrong
        if rejected != chosen
    ]


def read(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(path: Path, rows: Iterable[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{text.count(chr(10))} rows in {path}")


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    folder = source / "grade_school_math" / "data"
    write(
        target / "sft.jsonl",
        (
            {"prompt": row["question"], "completion": clean(row["answer"])}
            for row in read(folder / "train.jsonl")
        ),
    )
    problems = [found for row in read(folder / "example_model_solutions.jsonl") if (found := pairs(row))]
    for name, is_test in (("train", False), ("test", True)):
        kept = [found for i, found in enumerate(problems) if (i % _TEST_EVERY == _TEST_EVERY - 1) == is_test]
        write(target / f"preferences_{name}.jsonl", (pair for found in kept for pair in found))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
