"""A user's own model and data, through the command line: a factory with a CSV, a forest with Parquet, a folder of images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
from PIL import Image
from sklearn.ensemble import RandomForestClassifier

from theodolite.core.sources import find_data

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
ADULT = [
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
]  # fmt: skip


def needed(name):
    path = find_data(name)
    if path is None:
        pytest.skip(f"needs {name}: set THEODOLITE_DATA")
    return path


def surveyed(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "theodolite", "survey", *map(str, arguments), "--out", str(tmp_path / "atlas"), "--json"],
        cwd=TESTS, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    atlas = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    assert json.loads(done.stdout)["name"] == atlas["name"]
    assert atlas["status"] == "complete"
    assert atlas["failed"] == []
    assert (tmp_path / "atlas" / "index.html").stat().st_size < 8_000_000
    found = {path.stem for path in (tmp_path / "atlas" / "findings").glob("*.json")}
    skipped = {step["slug"] for step in atlas["skipped"]}
    assert found == {step["slug"] for step in atlas["plan"] if step["applies"]} - skipped
    return atlas, found


def test_a_factory_with_a_csv(tmp_path):
    atlas, found = surveyed(
        tmp_path, "--model", "real_subjects:table_network", "--data", needed("winequality-white.csv"), "--no-header",
        "--target", "column12", "--epochs", 4, "--budget", "10m",
    )  # fmt: skip
    assert atlas["subject"]["kind"] == "network"
    assert atlas["subject"]["quality"]["low"] > atlas["subject"]["quality"]["chance"]
    assert found >= {
        "adaptive-data-analysis", "interaction-basis", "intrinsic-dimension", "label-geometry",
        "local-function-approximation", "relevance-pruning",
    }  # fmt: skip


def test_a_forest_with_a_parquet_file(tmp_path):
    frame = pd.read_csv(needed("adult-train.csv"), header=None, names=ADULT, skipinitialspace=True, na_values="?")
    frame = frame.dropna().sample(3000, random_state=0)
    fitted, other = frame.iloc[:1500], frame.iloc[1500:]
    columns = pd.get_dummies(fitted.drop(columns="income"))
    skops.io.dump(RandomForestClassifier(30, random_state=0).fit(columns, fitted["income"]), tmp_path / "m.skops")
    other.to_parquet(tmp_path / "adult.parquet")
    atlas, found = surveyed(
        tmp_path, "--model", tmp_path / "m.skops", "--data", tmp_path / "adult.parquet", "--target", "income"
    )
    assert atlas["subject"]["model"] == "RandomForestClassifier"
    assert found >= {"adaptive-data-analysis", "local-function-approximation"}
    reasons = {step["slug"]: step["reason"] for step in atlas["plan"] if not step["applies"]}
    assert "RandomForestClassifier is a black box" in reasons["intrinsic-dimension"]


def test_a_folder_of_images(tmp_path):
    with np.load(needed("mnist.npz")) as file:
        images, labels = file["x_train"][:800], file["y_train"][:800]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "images" / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    atlas, found = surveyed(tmp_path, "--data", tmp_path / "images", "--image-size", 14, "--epochs", 15)
    assert atlas["subject"]["data"]["modality"] == "image"
    assert atlas["subject"]["quality"]["low"] > 0.7
    assert {"label-geometry", "interaction-basis", "intrinsic-dimension"} <= found
