"""Figures of the pages that come from no result file, each with the reason."""

from benchmarks.pages.unmarked import Allowed

INTERVAL = "a confidence level"
SETTING = "a setting or an assumption, not a measurement"
SIZE = "the size of a model"
PAPER = "a value of the paper's recipe (arXiv 2505.19223)"
PREDICTION = "predicted by benchmarks/gpu_model.py or by hand, before measuring"
AIM = "what was aimed at before measuring"
WITHDRAWN = "a figure of an earlier version of the page, quoted as withdrawn"

ALLOWED = (
    Allowed("docs/gpu.md", "48 GiB of device memory", "what a run needs, above the largest peak of step.csv"),
    Allowed("docs/cpu.md", "512 of 1024 positions", SETTING),
    Allowed("docs/gpu.md", "116 rows until its time limit", SETTING),
    Allowed("docs/gpu.md", "with 8 and 16 of the 32", SETTING),
    Allowed("docs/gpu.md", "About 1.6 ms of other work is queued", "benchmarks/gpu_bench.py"),
    Allowed("docs/gpu.md", "NVIDIA H100 80GB HBM3 (700 W)", "the name of the card and its power limit"),
    Allowed("docs/gpu.md", "the power limit of 700 W", "the card's"),
    Allowed("docs/gpu.md", "is exactly 0.0", "what a test asks for"),
    Allowed("docs/gpu.md", "The goal was 90 % from N = 4096 on and 80 % at 512", AIM),
    Allowed("docs/gpu.md", "1 to 2 points are missing", AIM),
    Allowed("docs/gpu.md", "was predicted to gain 5 to 7 %", PREDICTION),
    Allowed("docs/gpu.md", "4 to 5 % of a block (2.1 beside 45 microseconds in the model)", PREDICTION),
    Allowed("docs/gpu.md", "of TRL (chunk 4096", SETTING),
    Allowed("docs/gpu.md", "Triton 3.6 compiles", "a version"),
    Allowed("docs/gpu.md", "Predicted: 95 %", PREDICTION),
    Allowed("docs/gpu.md", "The goal, 50 % at K = 8 with LoRA", AIM),
    Allowed("docs/gpu.md", "models of 10.6 M parameters", SIZE),
    Allowed("docs/gpu.md", "counts 32 times over every word", "the algorithm: one step for each bit"),
    Allowed("README.md", "A LLaDA of 0.17 M parameters", SIZE),
    Allowed("README.md", "a 0.9 M-parameter LLaDA", SIZE),
    Allowed("README.md", "GSM8K at 10.6 M parameters", SIZE),
    Allowed("README.md", "(K = 8, beta 0.2, 1 x SFT term, 100 steps", SETTING),
    Allowed("README.md", "1 instead of the paper's 0.05", PAPER),
    Allowed("README.md", "give the sampler 1, 2 and 4 times the masks", SETTING),
    Allowed("README.md", "0.05 x SFT term, AdamW betas 0.9 / 0.95", PAPER),
    Allowed("README.md", "(0.05 to 1; the quickstart", SETTING),
    Allowed("README.md", "| 1, 2, 3 | C++", "products that the formulas need"),
    Allowed("README.md", "1 unit is one matmul", "a definition"),
    Allowed("README.md", "masks about .4 of the tokens", "exact: tests/estimator/test_designs.py"),
    Allowed("README.md", "NVIDIA H100 80GB HBM3", "the name of the card"),
    Allowed("docs/benchmarks.md", "(1.10)", "the default of --threshold"),
    Allowed("docs/benchmarks.md", "the 95 % interval", INTERVAL),
    Allowed("docs/mask-designs.md", "10.6 M", SIZE),
    Allowed("docs/mask-designs.md", "sums (0.39 M parameters), GSM8K text (0.95 M)", SIZE),
    Allowed("docs/mask-designs.md", "(0.95 M; SFT goes on", SIZE),
    Allowed("docs/mask-designs.md", "at most 19 % of the ELBO", "exact: tests/estimator/test_elbo.py"),
    Allowed(
        "docs/mask-designs.md", "masks .41 of the tokens a sample", "exact: tests/estimator/test_designs.py"
    ),
    Allowed("docs/mask-designs.md", "95 % interval", INTERVAL),
    Allowed("docs/mask-designs.md", "a mean of at most .5 and no model above .7", AIM),
    Allowed("docs/mask-designs.md", "the aim, .7 in the mean and .85 on the worst model", AIM),
    Allowed("docs/mask-designs.md", "are above .85, up to", AIM),
    Allowed("docs/mask-designs.md", "The aim of .35 in the mean", AIM),
    Allowed("docs/mask-designs.md", "how many within .1", "the bound that the column counts by"),
    Allowed("docs/mask-designs.md", "within .1 on", "the bound that the column counts by"),
    Allowed("docs/mask-designs.md", "was given as .47 [.41, .54]", WITHDRAWN),
    Allowed("docs/mask-designs.md", "(.26 and .36 against .40 and .62)", WITHDRAWN),
    Allowed("docs/cpu.md", "95 % intervals", INTERVAL),
    Allowed("docs/training.md", "(1.16) reads it", "a version of TRL"),
    Allowed("docs/training.md", "(the default is 0.05)", SETTING),
    Allowed("docs/scaling.md", "One 80 GB GPU", SETTING),
    Allowed("docs/scaling.md", "2 to 8 x 80 GB", SETTING),
    Allowed("docs/scaling.md", "H100s with 79.1 GiB, of which tensors may take 73.7", SETTING),
    Allowed("docs/scaling.md", "collectives at 300 GB/s inside a node of 8 and 40 GB/s", SETTING),
    Allowed("docs/scaling.md", "0.9 of the arithmetic with collectives hidden, to 1.2 of it", SETTING),
    Allowed(
        "docs/scaling.md", "in 16 bits, until it may reduce them: 16 GB", "2 bytes of each of 8 B weights"
    ),
)
