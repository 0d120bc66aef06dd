"""The GSM8K recipe's data from the files of grade-school-math."""

import json

from examples.gsm8k import make_data


def solution(text, is_correct):
    return {"solution": text, "is_correct": is_correct}


def test_make_data__pairs_a_wrong_solution_with_a_correct_one_else_the_reference(tmp_path):
    source = tmp_path / "grade_school_math" / "data"
    source.mkdir(parents=True)
    answer = "He runs 9*60=<<9*60=540>>540 meters\n#### 540"
    (source / "train.jsonl").write_text(json.dumps({"question": "How far?", "answer": answer}) + "\n")
    problems = []
    for right in range(3):
        solved = [solution(f"So 1+1=<<1+1=2>>2\nA: {n}", n < right) for n in range(4)]
        problem = dict(zip(make_data._MODELS, solved, strict=True))
        problems.append(problem | {"question": f"Question {right}", "ground_truth": "So 2\nA: 2"})
    text = "".join(json.dumps(problem) + "\n" for problem in problems)
    (source / "example_model_solutions.jsonl").write_text(text)
    make_data.main(tmp_path, tmp_path / "out")

    def rows(name):
        return [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]

    assert rows("sft.jsonl") == [{"prompt": "How far?", "completion": "He runs 9*60=540 meters\nA: 540"}]
    found = rows("preferences_train.jsonl")
    assert [row["prompt"] for row in found] == ["Question 0"] * 4 + ["Question 1"] * 3 + ["Question 2"] * 2
    assert found[0] == {"prompt": "Question 0", "chosen": "So 2\nA: 2", "rejected": "So 1+1=2\nA: 0"}
    assert {row["chosen"] for row in found if row["prompt"] != "Question 0"} == {"So 1+1=2\nA: 0"}
    assert rows("preferences_test.jsonl") == []
