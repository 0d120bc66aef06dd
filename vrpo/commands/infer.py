"""`vrpo score`, `vrpo variance`, `vrpo generate`: run, and print what came out."""

from vrpo.commands.console import say, say_metrics
from vrpo.evaluation.score import ScoreArguments, score_file
from vrpo.evaluation.variance_report import VarianceArguments, report
from vrpo.generation.answer import GenerateArguments, answer
from vrpo.models.quantized import Quantization


def score(args: ScoreArguments, quantization: Quantization) -> None:
    summary, data_report = score_file(args, quantization)
    say(f"data: {data_report}\n")
    say_metrics(summary)
    say(f"saved the score of each row in {args.output_file}\n")


def variance(args: VarianceArguments) -> None:
    say(report(args))


def generate(args: GenerateArguments, quantization: Quantization) -> None:
    answers = answer(args, quantization)
    if args.prompt is not None:
        say("\n\n".join(item["response"] for item in answers) + "\n")
    if args.output_file is not None:
        say(f"saved {len(answers)} answers in {args.output_file}\n")
