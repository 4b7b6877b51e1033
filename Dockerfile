# The web page as a user without rights. On a CPU:
#     docker build -t pbe . && docker run --rm -p 127.0.0.1:7860:7860 pbe
# On a GPU:
#     docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t pbe . && docker run --rm --gpus all -p 127.0.0.1:7860:7860 pbe
# Another model: docker run ... -v /path/to/model:/model:ro pbe --model /model
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY pbe pbe
COPY configs configs
COPY data data
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[web]" \
    && rm -rf /src \
    && useradd --create-home pbe

USER pbe
WORKDIR /home/pbe
ENV NO_ALBUMENTATIONS_UPDATE=1 GRADIO_ANALYTICS_ENABLED=False
EXPOSE 7860
# A door that opens is enough: with --user every answer asks for a password.
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 7860), 5)"]
ENTRYPOINT ["pbe", "serve", "--host", "0.0.0.0"]
