"""A contender of serve.py: the model behind LitServe, a process with one session for each core.

LitServe pickles its API for its processes, so the class stands in a module of its own.
"""

import sys
from typing import Any

import litserve
from fastapi import Request

from pomona.backbone import extract
from pomona.core.cpus import available_cpus
from pomona.model import artifact
from pomona.photos import decoding


class Api(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, folder: str) -> None:
        super().__init__(api_path="/v1/predict")
        self.folder = folder

    def setup(self, device: str) -> None:
        found = artifact.load_model(self.folder)
        self.labels, self.spec = found.labels, found.spec(device="cpu")

    def decode_request(self, request: Request) -> Any:
        return decoding.decode(request["photo"].file.read(), self.spec.image_size).pixels

    def predict(self, pixels: Any) -> Any:
        return extract.load_network(self.spec)(pixels[None])[0][0]

    def encode_response(self, probabilities: Any) -> dict[str, Any]:
        best = int(probabilities.argmax())
        return {"label": self.labels[best], "probability": float(probabilities[best])}


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(sys.argv[1]), accelerator="cpu", workers_per_device=available_cpus()
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
