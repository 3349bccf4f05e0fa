"""A stand-in of the package `xares_llm`: its command line, its task files and what it leaves on disk, in no time.

It trains nothing: a checkpoint is a note of its steps, and a score is made of a dataset's name. What it was told and
did goes into the file `said.jsonl` beside it, so that tests can look. `FAIL` names datasets that it stumbles over,
`CUT` the step at which training breaks off.
"""

from __future__ import annotations

from pathlib import Path

CHECKER = """
def check_audio_encoder(encoder):
    import torch
    features, mask = encoder(torch.randn(3, 50000), None)
    if features.shape[2] != encoder.output_dim:
        raise ValueError("width")
"""

RUN = """
import argparse, json, os, sys
from pathlib import Path
import yaml

parser = argparse.ArgumentParser()
parser.add_argument("encoder_path")
parser.add_argument("train_config", nargs="?", default="all")
parser.add_argument("eval_configs", nargs="?", default="all")
parser.add_argument("--model_args", type=json.loads, default={})
args = parser.parse_args()
train = yaml.safe_load(open(args.train_config))
evaluations = yaml.safe_load(open(args.eval_configs))
said = {"encoder": args.encoder_path, "model_args": args.model_args, "train": train, "trained": False}
said |= {"datasets": list(evaluations), "data": os.environ["XARES_DATA_HOME"]}
name = args.encoder_path.rsplit(".", 1)[-1]
folder = Path(train["output_dir"]) / Path(args.train_config).stem / name
folder.mkdir(parents=True, exist_ok=True)
steps = train.get("max_steps", 10)

def note():
    with open(Path(__file__).with_name("said.jsonl"), "a") as file:
        file.write(json.dumps(said) + "\\n")

if not list(folder.glob("checkpoint-*")):  # as the real one: any checkpoint is a finished training
    said["trained"] = True
    cut = int(os.environ.get("CUT", 0))
    checkpoint = folder / f"checkpoint-{cut or steps}"
    checkpoint.mkdir()
    state = {"global_step": cut or steps, "max_steps": steps}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    if cut:
        note()
        print("Traceback (most recent call last):")
        sys.exit("torch.OutOfMemoryError: CUDA out of memory")
said["scored"] = []
for dataset in evaluations:
    cache = folder / f"score_{dataset}.yaml"
    if not cache.exists():
        if dataset in os.environ.get("FAIL", "").split(","):
            note()
            sys.exit(f"ValueError: cannot score {dataset}")
        cache.write_text(yaml.safe_dump({"score": len(dataset) / 20}))
        said["scored"].append(dataset)
note()
print("Scoring completed")
"""

TRAIN = """
max_steps: 10
train_data:
  ESC-50:
    prompt: Classify the sound.
    data: ["ESC-50/train/fold_{1..2}.tar.gz"]
    key: label
    repo_id: some/where
"""
EVAL = """
eval_esc-50:
  data: {data: [ESC-50/test/fold_3.tar.gz], key: label, prompt: Classify., repo_id: some/where}
  metric: Accuracy
eval_gtzan:
  data: {data: [GTZAN/test/fold_1.tar.gz], key: genre, prompt: Genre., repo_id: some/where}
  metric: Accuracy
  weight: 3
"""


def install(folder: Path) -> Path:
    """Write the package into a folder that goes on PYTHONPATH; returns the package's own folder."""
    package = folder / "xares_llm"
    files = {
        "__init__.py": "",
        "task.py": "",
        "audio_encoder_checker.py": CHECKER,
        "run.py": RUN,
        "tasks/task1/train/train_task1_config.yaml": TRAIN,
        "tasks/task1/eval/eval_task1_config.yaml": EVAL,
        "tasks/single/train/gtzan_config.yaml": TRAIN,
        "tasks/single/eval/gtzan_test_config.yaml": EVAL,
    }
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package
