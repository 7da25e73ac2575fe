"""`kdtrain`: the commands. Everything heavy is imported when a command needs it, so that help is instant."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EXIT_CODES = "exit codes: 0 done, 1 unexpected, 2 bad input, 3 out of memory, 4 diverged, 130 interrupted (state saved)"
STDOUT = 1
SMALLER_STEPS = (
    "raise train.accumulate (--set train.accumulate=2, 4, ...: smaller micro-batches, the same batch and the same result), "
    "then lower data.patch, or use train.precision=bf16"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; what went wrong is one message on stderr."""
    # libgomp's threads spin for milliseconds at every barrier; where another process holds a core, each then waits for the scheduler.
    # Spinning less costs a few percent on an idle machine (2 cores: 100 -> 97 steps/s) and is 5 times faster beside one busy process.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch loads libgomp, which is after this
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from trainers.errors import ImageLost, out_of_memory

        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 1
        known = exit_code(error)
        if known is None:
            raise  # a bug of ours: the traceback is what we need, and Python exits with 1
        code, message = known
        said = [message, *([options.less_memory] if out_of_memory(error) else []), *getattr(error, "__notes__", [])]
        # On several devices all processes end together for these reasons; the first one says it.
        if _is_first_process() or code not in (2, 4, 130) or isinstance(error, (ImageLost, OSError)):
            print("\n".join(said), file=sys.stderr)
        return code


def _reader_has_gone() -> bool:
    """Whether what reads our output has ended, as `head` does; the rest of the output then goes nowhere."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # a pipe that nobody reads reports an error unasked
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # else Python complains when it flushes at its end
    return True


def _is_first_process() -> bool:
    """On several devices Fabric, torchrun or SLURM starts this command once for each."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _say(text: str) -> None:
    if _is_first_process():
        print(text)


def exit_code(error: Exception) -> tuple[int, str] | None:
    """(exit code, message) of a failure that is no bug."""
    from trainers import errors
    from trainers.checkpoint import SaveFailed
    from trainers.signals import Interrupted

    if isinstance(error, errors.InputError):
        return 2, "\n".join(error.problems)
    for kind, code in ((errors.OutOfMemory, 3), (errors.Diverged, 4), (Interrupted, 130), (SaveFailed, 1)):
        if isinstance(error, kind):
            return code, str(error)
    failed = errors.disk_failure(error) or errors.process_lost(error)
    if failed is not None:
        return 1, failed
    unusable = errors.unusable_path(error)
    if unusable is not None:
        return 2, unusable
    if errors.out_of_memory(error):
        return 3, f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kdtrain", description="Knowledge distillation for image restoration.", epilog=EXIT_CODES
    )
    commands = top.add_subparsers(metavar="command", required=True)

    init = _command(commands, "init", "write a commented config", _init)
    init.add_argument("path", nargs="?", type=Path, default=Path("run.yaml"), help="file to write (default: run.yaml)")
    init.add_argument("--method", default="facd", help="distillation method (default: facd)")
    init.add_argument("--task", default="sr", help="sr, denoise, derain, deblur or dehaze (default: sr)")
    init.add_argument("--schema", action="store_true", help="print the JSON schema of configs, for editors, and stop")

    check = _command(commands, "check", "find every problem of a config and its data", _check)
    _config_arguments(check)

    plan = _command(commands, "plan", "say what memory and time a step takes, and what makes it fit", _plan)
    _config_arguments(plan)
    plan.add_argument("--memory", metavar="SIZE", help="memory to fit in, such as 8GiB (default: what is free)")
    plan.add_argument(
        "--patch", metavar="SIDES", help="sides of patches to plan, such as 128,256 (default: data.patch)"
    )
    plan.add_argument(
        "--longest",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="simulate steps that take longer (default: 60)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON; the tables go to stderr")

    train = _command(commands, "train", "train a student and write its report", _train)
    _config_arguments(train)

    resume = _command(commands, "resume", "go on with a run, exactly where its last checkpoint stands", _resume)
    resume.add_argument("run_folder", type=Path, help="the run folder")
    _set_argument(resume)

    evaluate = _command(commands, "eval", "measure a run, a checkpoint or weights on images", _eval)
    evaluate.add_argument(
        "source", type=Path, help="run folder, checkpoint folder, .safetensors or .pth file, or builtin:edsr-x2"
    )
    evaluate.add_argument(
        "--data",
        action="append",
        metavar="NAME=PLACE",
        help="ground truths: a folder, an image, or photos (default: the run's validation sets, or photos); may be repeated",
    )
    evaluate.add_argument("--lq", type=Path, help="folder of degraded inputs, or the image (default: made on the fly)")
    evaluate.add_argument("--lq-template", default="{}", help="name of an input, as in a config (default: {})")
    evaluate.add_argument("--task", help="sr, denoise, derain, deblur or dehaze (default: the run's)")
    evaluate.add_argument(
        "--degradation", help="how inputs are made, e.g. '{name: noise, sigma: 15}' (default: the run's)"
    )
    evaluate.add_argument("--protocol", help="how to measure (default: the run's, or the task's)")
    evaluate.add_argument("--piqe", action="store_true", help="also measure PIQE, which needs no ground truth")
    evaluate.add_argument(
        "--brisque", type=Path, metavar="MODEL", help="also measure BRISQUE, by OpenCV's brisque_model_live.yml"
    )
    _inference_arguments(evaluate, "the run's val.tile, or 0: whole")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    restore = _command(commands, "restore", "restore pictures with a run, a checkpoint or weights", _restore)
    restore.add_argument("given", metavar="in", type=Path, help="a picture, or a folder of them")
    restore.add_argument("out", type=Path, help="folder for the restored pictures (PNG), or a .png file for one")
    source = restore.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, help="checkpoint folder, .safetensors or .pth file, or builtin:edsr-x2")
    source.add_argument("--run", type=Path, dest="run_folder", help="run folder")
    _inference_arguments(restore, "0: whole")

    compare = _command(
        commands, "compare", "put runs side by side in one report, and train those that are missing", _compare
    )
    compare.add_argument("run_folders", type=Path, nargs="*", help="finished runs; or give --recipe and --methods")
    compare.add_argument("--recipe", help="a recipe of ours (demo) or a YAML file: train it once with each method")
    compare.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        help="with --recipe: facd,fakd or also sliced, plain training from a slice of the teacher; scratch and output are added",
    )
    compare.add_argument(
        "--seeds",
        type=_seeds,
        default=[],
        metavar="0,1,2",
        help="with --recipe: train with each (default: the config's)",
    )
    compare.add_argument("-o", "--out", type=Path, default=Path("runs/comparison"), help="folder of the comparison")
    _set_argument(compare)

    codec = _command(
        commands, "codec", "train the small encoder with a codebook that contrastive methods may use", _codec
    )
    codec.add_argument("out", type=Path, help="file to write (.safetensors)")
    codec.add_argument("--images", default="photos", help="folder of images, or photos (default: photos)")
    codec.add_argument("--steps", type=int, default=2000, help="optimiser steps (default: 2000)")
    codec.add_argument("--seed", type=int, default=0, help="seed of weights and patches (default: 0)")

    export = _command(
        commands, "export", "write a student as safetensors and ONNX, with a card of what it is and costs", _export
    )
    export.add_argument(
        "source", type=Path, help="run folder, checkpoint folder, .safetensors or .pth file, or builtin:edsr-x2"
    )
    export.add_argument("-o", "--out", type=Path, help="folder to write (default: export-NAME)")
    export.add_argument("--onnx", action="store_true", help="also write ONNX, compared with torch; needs kdops[onnx]")
    export.add_argument(
        "--size", type=_size, default=(256, 256), metavar="HxW", help="image to measure on (default: 256x256)"
    )
    export.set_defaults(less_memory="measure on a smaller image: --size 128x128, or less")

    data = commands.add_parser("data", help="look into data sets", description="Look into data sets.")
    data_commands = data.add_subparsers(metavar="command", required=True)
    data_check = _command(
        data_commands,
        "check",
        "count, pair and decode every image of downloaded folders, and say what is wrong",
        _data_check,
    )
    data_check.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folder; all below it is looked at too")
    data_check.add_argument("--patch", type=_positive, default=96, help="least side of a ground truth (default: 96)")
    data_check.add_argument(
        "--scale", type=_positive, help="upsampling factor (default: what most pairs of a folder have)"
    )

    _command(commands, "doctor", "show what this machine has and which backends run", _doctor)
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=EXIT_CODES
    )
    command.set_defaults(run=run, less_memory=SMALLER_STEPS)
    return command


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, help="the YAML file")
    _set_argument(command)


def _inference_arguments(command: argparse.ArgumentParser, whole: str) -> None:
    command.add_argument(
        "--tile",
        type=int,
        help=f"restore tiles of so many pixels of the input, blended: less memory (default: {whole})",
    )
    command.add_argument(
        "--ensemble", action="store_true", help="average over the eight orientations: 8 times the work"
    )
    command.set_defaults(less_memory="restore in smaller tiles: --tile 256, or less")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _seeds(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers, such as 0,1,2")
    return [int(part) for part in text.split(",")]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text}: give seconds, such as 60")
    return seconds


def _set_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, e.g. --set train.lr=3e-4; may be repeated; relative paths are relative to the YAML file",
    )


def _init(options: argparse.Namespace) -> int:
    from trainers.starter import schema, write_starter

    if options.schema:
        print(schema())
        return 0
    write_starter(options.path, options.task, options.method)
    print(f"wrote {options.path}; next: kdtrain check {options.path}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from trainers.check import check

    problems, notes = check(options.config, options.set)
    for note in notes:
        print(f"note: {note}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}", file=sys.stderr)
        return 2
    print(f"{options.config}: no problems")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from trainers.check import checked_config
    from trainers.plan_table import plan_command

    config = checked_config(options.config, options.set, say=_say)
    return 0 if plan_command(config, options.memory, options.patch, options.longest, options.json) else 3


def _train(options: argparse.Namespace) -> int:
    from trainers.check import checked_config
    from trainers.launch import train

    folder = train(checked_config(options.config, options.set, say=_say))
    _say(f"done: {folder / 'report.html'}")
    return 0


def _resume(options: argparse.Namespace) -> int:
    from trainers.launch import resume

    folder = resume(options.run_folder, options.set)
    _say(f"done: {folder / 'report.html'}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    from trainers.measure import Wanted, measure, print_measured

    wanted = Wanted(
        data=options.data or [],
        lq=options.lq,
        lq_template=options.lq_template,
        task=options.task,
        degradation=options.degradation,
        protocol=options.protocol,
        tile=options.tile,
        ensemble=options.ensemble,
        piqe=options.piqe,
        brisque=options.brisque,
    )
    print_measured(measure(options.source, wanted), as_json=options.json)
    return 0


def _restore(options: argparse.Namespace) -> int:
    from trainers.restore import restore

    source = options.weights or options.run_folder
    for written in restore(options.given, options.out, source, tile=options.tile or None, ensemble=options.ensemble):
        print(written)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from trainers.compare import compare, run_and_compare
    from trainers.errors import InputError
    from trainers.terminal import plain_console

    if bool(options.run_folders) == bool(options.recipe) or bool(options.recipe) != bool(options.methods):
        raise InputError("give either run folders, or --recipe and --methods")
    if options.run_folders and (options.seeds or options.set):
        raise InputError(
            "--seeds and --set are for runs that are trained with --recipe: leave them out beside run folders"
        )
    if options.recipe:
        console = plain_console(stderr=True, quiet=not _is_first_process())
        recipe = _recipe(options.recipe)
        report = run_and_compare(recipe, options.methods, options.out, options.set, options.seeds, console)
    else:
        report = compare(options.run_folders, options.out)
    _say(f"done: {report}")
    return 0


def _recipe(name: str) -> Path:
    """A YAML file, or the name of a recipe that ships with the package."""
    shipped = Path(__file__).parent / "recipes" / f"{name}.yaml"
    return shipped if shipped.is_file() else Path(name)


def _codec(options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.config import Data, TrainFolders
    from trainers.progress import TrainingProgress
    from trainers.train_codec import train_codec

    data = Data(train="photos" if options.images == "photos" else TrainFolders(gt=options.images))
    progress = TrainingProgress(Console(stderr=True), 0, options.steps, shown=True)
    train_codec(options.out, data, options.steps, options.seed, progress)
    print(f"wrote {options.out}; use it with method.features={{name: codec, weights: {options.out}}}")
    return 0


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text}: give height and width, such as 256x256")
    return int(height), int(width)


def _export(options: argparse.Namespace) -> int:
    from trainers.export import export

    out = options.out or Path(f"export-{options.source.resolve().name}")
    for file in export(options.source, out, onnx=options.onnx, size=options.size):
        print(file)
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from trainers.data_check import data_check_command

    return 0 if data_check_command(options.paths, options.patch, options.scale) else 2


def _doctor(options: argparse.Namespace) -> int:
    from trainers.doctor import report

    print(report())
    return 0
