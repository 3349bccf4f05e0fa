"""The `bestrq2` command: a command gathers arguments and calls one function.

All else is imported inside the commands, so that `--help` is quick and Ctrl-C is caught from the first moment.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bestrq2._version import __version__
from bestrq2.errors import BestRQ2Error, ConfigError, StoppedBySignal

# Wrong input; a failing machine; a program that a signal ended has 128 and its number, as shells and schedulers expect.
EXIT_WRONG_INPUT, EXIT_FAILURE, EXIT_SIGNAL = 2, 1, 128


def _pretrain(argv: Sequence[str]) -> None:
    try:
        from bestrq2.train.config import parse_arguments

        config, resume = parse_arguments(argv)
        # Lightning takes seconds to import: whoever mistypes a flag, or asks for help, does not wait for it.
        from bestrq2.train.pretraining import run_pretraining

        folder = run_pretraining(config, resume=resume)
    except BestRQ2Error as error:
        # What is wrong with the input is the same for all processes: one says it.
        if type(error) is not BestRQ2Error and not _first_process():
            sys.exit(EXIT_WRONG_INPUT)
        raise
    if not _first_process():
        return
    print(f"{folder}: done. Embed audio with: bestrq2 embed {folder} FOLDER --output embeddings.parquet")


def _first_process() -> bool:
    if not any(name in os.environ for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_NTASKS")):
        return True  # there is no other one
    from bestrq2.train.processes import first_process

    return first_process()


def _prepare(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.data.prepare import check, run

    parser = flags.make_parser("prepare", "Decode, resample and check any source once, and pack it into tars.")
    parser.add_function_arguments(run.prepare, as_group=False, as_positional=True)
    parser.add_argument("--check", action="store_true", help="check what lies in OUTPUT instead: every shard and clip")
    values = _values(flags.parse_flags(parser, argv))
    if values.pop("check"):
        check.check_prepared(values["output"], values["num_workers"])
    else:
        run.prepare(**values)
    print(values["output"])


def _replay(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.train.replay import replay

    parser = flags.make_parser("replay", "Do a step again that a run saved because it was not finite, and say why.")
    parser.add_function_arguments(replay, as_group=False, as_positional=True)
    print(replay(**_values(flags.parse_flags(parser, argv))))


def _embed(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.inference.corpus.command import embed_corpus

    parser = flags.make_parser("embed", "Embed every recording of a corpus into a Parquet file.")
    parser.add_function_arguments(embed_corpus, as_group=False, as_positional=True, skip={"output"})
    parser.add_argument("--output", type=str, required=True, help="Parquet file to write")
    output = embed_corpus(**_values(flags.parse_flags(parser, argv)))
    if output.exists():  # of several processes, the last one writes it
        print(output)


def _probe(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.evaluate.command import probe
    from bestrq2.evaluate.table import format_table

    parser = flags.make_parser("probe", "Linear probe and k-NN on labelled audio, beside the baselines.")
    parser.add_function_arguments(probe, as_group=False, as_positional=True)
    print(format_table(probe(**_values(flags.parse_flags(parser, argv)))))


def _xares(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.evaluate.xares.command import check_complete, list_tasks, xares
    from bestrq2.evaluate.xares.table import render_table
    from bestrq2.report.of_xares import write_pages

    parser = flags.make_parser("xares", "Score a model on X-ARES by the benchmark's own harness.")
    parser.add_argument("model", nargs="?", type=str, help="run folder, exported folder, checkpoint, recipe or hub id")
    parser.add_function_arguments(xares, as_group=False, skip={"model", "keep_embeddings"})
    parser.add_argument("--keep-embeddings", action="store_true", help="leave embeddings on disk after their scores")
    parser.add_argument("--list", action="store_true", help="list the tasks and where their data are, and end")
    values = _values(flags.parse_flags(parser, argv))
    if values.pop("list"):
        print(list_tasks(values["data"], values["cache"]))
        return
    if values["model"] is None:
        raise ConfigError("name a model to score, or give --list")
    result = xares(**values)
    print(render_table(result))
    for page in write_pages(values["model"], values["output"]):
        print(f"report: {page}")
    check_complete(result)


def _xares_llm(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.evaluate.xares_llm import command
    from bestrq2.evaluate.xares_llm.results import format_table

    parser = flags.make_parser("xares-llm", "Score an encoder in front of a small language model, by XARES-LLM itself.")
    parser.add_function_arguments(command.xares_llm, as_group=False, as_positional=True)
    parser.add_argument("--check", action="store_true", help="only check the encoder by the benchmark's contract")
    values = _values(flags.parse_flags(parser, argv))
    if values.pop("check"):
        names = ("model", "output", "phases", "layers", "python")
        print(command.check(**{name: values[name] for name in names}))
        return
    result = command.xares_llm(**values)
    print(format_table(result))
    if result.missing:
        lacking = f"{len(result.missing)} of {len(result.expected)} datasets have no score"
        raise BestRQ2Error(f"{lacking}; the same command again does those alone")


def _finetune(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.train.finetuning import finetune

    parser = flags.make_parser("finetune", "Fine-tune an encoder as a classifier of labelled recordings.")
    parser.add_function_arguments(finetune, as_group=False, as_positional=True, skip={"output", "resume"})
    parser.add_argument("--output", type=str, required=True, help="run folder to write")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, or start it")
    result = finetune(**_values(flags.parse_flags(parser, argv)))
    print(f"{result.text}\n\nClassify audio with: bestrq2 predict {result.output} FOLDER --output predictions.csv")


def _predict(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.inference.predicting import predict

    parser = flags.make_parser("predict", "Name the classes of every recording of a corpus, as a CSV file.")
    parser.add_function_arguments(predict, as_group=False, as_positional=True, skip={"output"})
    parser.add_argument("--output", type=str, required=True, help="CSV file to write")
    print(predict(**_values(flags.parse_flags(parser, argv))))


def _compare(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.report.comparison import compare

    parser = flags.make_parser("compare", "Compare runs: probes, cost and losses, with intervals over their seeds.")
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help="run folders; the first is the baseline")
    parser.add_function_arguments(compare, as_group=False, skip={"runs", "reference", "unfinished"})
    parser.add_argument("--reference", action="store_true", help="put the reference runs of the package beside them")
    parser.add_argument("--unfinished", action="store_true", help="compare runs with steps left to do too")
    comparison = compare(**_values(flags.parse_flags(parser, argv)))
    print(f"{comparison.text}\n\nfigures and numbers: {comparison.output}")


def _info(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.inference.info import info

    parser = flags.make_parser("info", "Parameters, cost and origin of a model or a recipe.")
    parser.add_function_arguments(info, as_group=False, as_positional=True)
    facts = info(**_values(flags.parse_flags(parser, argv)))
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


def _soundworld(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.soundworld import write_corpus

    parser = flags.make_parser("soundworld", "Write the synthetic corpus and its labelled tasks.")
    parser.add_function_arguments(write_corpus, as_group=False, as_positional=True, skip={"progress", "clips"})
    parser.add_argument("--clips", type=int, default=200, help="labelled clips per task, and unlabelled clips")
    values = _values(flags.parse_flags(parser, argv))
    write_corpus(**values)
    print(values["output"])


def _demo(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.demo import demo
    from bestrq2.evaluate.table import format_table

    parser = flags.make_parser("demo", "Pretrain tiny encoders on synthetic audio, probe them and write a report.")
    parser.add_function_arguments(demo, as_group=False)
    result = demo(**_values(flags.parse_flags(parser, argv)))
    print(format_table(result.scores))
    print(f"\n{result.summary}\nreport: {result.report}")


_WITH_PREDICTOR = "write predictor, head and quantizer too, so that pretraining can go on from there"


def _export(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.exporting import export

    parser = flags.make_parser("export", "Write a model as a folder for the hub, as ONNX or in the reference's layout.")
    parser.add_function_arguments(export, as_group=False, as_positional=True, skip={"with_predictor", "int8"})
    parser.add_argument("--with-predictor", action="store_true", help=_WITH_PREDICTOR)
    parser.add_argument("--int8", action="store_true", help='of "onnx", quantise the weights to 8 bits as well')
    print(export(**_values(flags.parse_flags(parser, argv))))


def _push(argv: Sequence[str]) -> None:
    from bestrq2 import flags
    from bestrq2.exporting import push

    parser = flags.make_parser("push", "Export a model and upload it to the Hugging Face hub.")
    parser.add_function_arguments(push, as_group=False, as_positional=True, skip={"with_predictor", "private"})
    parser.add_argument("--with-predictor", action="store_true", help=_WITH_PREDICTOR)
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    print(push(**_values(flags.parse_flags(parser, argv))))


def _values(parsed: object) -> dict[str, Any]:
    values = vars(parsed).copy()
    values.pop("config", None)
    return values


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "demo": (_demo, "pretrain tiny encoders on synthetic audio, probe them, write a report (minutes, no GPU)"),
    "pretrain": (_pretrain, "pretrain an encoder on a folder of recordings"),
    "prepare": (_prepare, "decode, check and pack any source into tars that are read fast"),
    "replay": (_replay, "do a failed training step again and say where it stopped being finite"),
    "soundworld": (_soundworld, "write the synthetic corpus and its labelled tasks"),
    "embed": (_embed, "embed every recording of a corpus into a Parquet file"),
    "probe": (_probe, "linear probe and k-NN on labelled audio, beside the baselines"),
    "xares": (_xares, "score a model on X-ARES by the benchmark's own harness, beside published results"),
    "xares-llm": (_xares_llm, "score an encoder in front of a small language model, by XARES-LLM itself"),
    "finetune": (_finetune, "fine-tune an encoder as a classifier of labelled recordings"),
    "predict": (_predict, "name the classes of every recording of a corpus with a fine-tuned encoder"),
    "compare": (_compare, "tables and figures of several runs: probes, cost and losses over their seeds"),
    "export": (_export, "write a model as a folder for the hub, as ONNX or in the reference's layout"),
    "push": (_push, "export a model and upload it to the Hugging Face hub"),
    "info": (_info, "parameters, cost and origin of a model or a recipe"),
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"bestrq2 {__version__}: self-supervised audio encoders by BEST-RQ-2",
            "",
            "usage: bestrq2 COMMAND ...",
            "",
            *lines,
            "",
            "`bestrq2 COMMAND --help` lists the settings of a command.",
        ]
    )


def run(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"bestrq2 {__version__}")
        return 0
    command, name = COMMANDS.get(argv[0]), argv[0]
    try:
        if command is None:
            from bestrq2 import flags

            raise ConfigError(f"there is no such command{flags.nearest(name, list(COMMANDS))}")
        command[0](argv[1:])
    except BestRQ2Error as error:
        print(f"bestrq2 {name}: {error}", file=sys.stderr)
        return EXIT_FAILURE if type(error) is BestRQ2Error else EXIT_WRONG_INPUT
    except KeyboardInterrupt as error:
        print(f"\nbestrq2 {name}: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return EXIT_SIGNAL + int(getattr(error, "signal", signal.SIGINT))
    return 0


def _terminate(number: int, frame: object) -> None:
    raise StoppedBySignal("terminated", number)


def main() -> None:
    """Entry point of the console script; SIGTERM ends a command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `bestrq2 info ... | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_SIGNAL + signal.SIGPIPE
    sys.exit(code)
