"""Claims on the normalization batch: that fewer than 16 images hurt, and that its noise regularizes."""

from functools import partial

from experiment.claims import images, learning, networks
from experiment.claims.claim import At, Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, Setting, grid
from experiment.claims.training import Recipe
from experiment.claims.verdicts import Rule

RATE = 0.1  # of setting R, as conf/task/sgd.yaml
FULL = 32


def _small(run: Run) -> Numbers:
    recipe = learning.recipe_of_r(RATE, 2 * learning.EPOCH)
    arm = f"ghost_{run['batch']}"
    return learning.learn(run, lambda: networks.resnet(arm), images.digits_on_photos(), recipe)[2]


def _points(at: At, batch: int) -> float:
    """Give the error at a batch less that at the full one, in points."""
    return 100 * (at("test_error", batch=batch) - at("test_error", batch=FULL))


SMALL_BATCHES = Claim(
    name="small_batches",
    sentence="Batches of fewer than 16 images hurt BatchNorm.",
    source="textbooks; Wu & He 2018, figure 1",
    literature="the threshold depends on the pixels per image: Wu & He 2018 found it between 8 and 16 on ImageNet",
    setup=(
        "R, but two epochs: SGD batches of 32 at a rate of 0.1, normalized in parts of 32, 16, 8, 4, 2 and 1 images. "
        "The rate is not tuned for each."
    ),
    parts=tuple(
        Part(
            f"batch of {batch}",
            f"{batch} image{'s' if batch > 1 else ''} hurt{'' if batch > 1 else 's'}.",
            f"test error at {batch} less that at 32",
            Rule("above", 1.0, "points"),
            partial(_points, batch=batch),
        )
        for batch in (8, 4, 2, 1)
    ),
    settings=tuple(grid(batch=(FULL, 16, 8, 4, 2, 1))),
    measure=_small,
    columns={"test_error": "test error, %", "train_error": "train error, %"},
    plots=(
        Plot(
            "Test error against the normalization batch",
            "test_error",
            "test error, %",
            lines=(),
            x="batch",
            x_label="images normalized together",
            log_y=True,
            percent=True,
        ),
    ),
)


def _noise(run: Run) -> Numbers:
    assert run.rate is not None
    is_all = run["batch"] == images.NUM_FEW
    arm = "bn" if is_all else f"ghost_{run['batch']}"
    recipe = Recipe(run.rate, normalize_all=is_all)
    return learning.learn(run, lambda: networks.mlp(arm), images.few_digits(), recipe)[2]


def _fewer_points(at: At, batch: int) -> float:
    """Give the error without noise less that with the noise of a batch, in points."""
    return 100 * (at("test_error", batch=images.NUM_FEW) - at("test_error", batch=batch))


def _without_noise(setting: Setting) -> Setting:
    return {**setting, "batch": images.NUM_FEW}


NOISE_REGULARIZES = Claim(
    name="noise_regularizes",
    sentence="The noise of the batch statistics regularizes.",
    source="Ioffe & Szegedy 2015, section 3.4; textbooks",
    literature="true but small (Hoffer et al. 2017; Luo et al. 2018); too much noise harms",
    setup=(
        "S with 200 training images and SGD batches of 32: normalized with the statistics of all 200 images, which is "
        "without noise, with those of the 32 images, or in parts of 16, 8 and 4. All at the rate that is best "
        "without noise, since the rate regularizes, too. The train loss tells whether all fit the training images."
    ),
    parts=tuple(
        Part(
            f"noise of {batch} images",
            f"The noise of {batch} images instead of all 200 lowers the test error.",
            f"test error with the statistics of all images, less that with those of {batch}",
            Rule("above", 0.0, "points"),
            partial(_fewer_points, batch=batch),
        )
        for batch in (FULL, 16, 8, 4)
    ),
    settings=tuple(grid(batch=(images.NUM_FEW, FULL, 16, 8, 4))),
    measure=_noise,
    columns={"test_error": "test error, %", "train_error": "train error, %", "train_loss": "train loss"},
    plots=(
        Plot(
            "Test error against the normalization batch",
            "test_error",
            "test error, %",
            lines=(),
            x="batch",
            x_label="images normalized together",
            percent=True,
        ),
    ),
    seeds=tuple(range(10, 30)),
    rates=(0.01, 0.03, 0.1, 0.3),
    tuned_as=_without_noise,
)
