"""The small real model of a home: its process, its ports, and where it answers."""

from hive_common.ops.config import write_config
from hive_executor.config import OLLAMA_URL
from hive_executor.small_model import SmallModelConfig, model_url

from hive_cli.home import Home
from hive_cli.model_servers import Urls
from hive_cli.supervisor import names
from hive_cli.supervisor.network import LOOPBACK, Network
from hive_cli.supervisor.plan import module_command
from hive_cli.supervisor.probes import http_probe
from hive_cli.supervisor.process import ProcessSpec

SILENCE_S = 60.0
PORTS = (names.SMALL_MODEL, names.ops_port(names.SMALL_MODEL))
"""Names of the ports that it listens on."""


def with_small_model(urls: Urls, ports: dict[str, int], is_on: bool) -> Urls:
    """Return where models may answer; `urls` is empty where nothing was chosen: where Ollama does by itself."""
    return (*(urls or (OLLAMA_URL,)), model_url(ports[names.SMALL_MODEL])) if is_on else urls


def write_small_model(home: Home, ports: dict[str, int], network: Network = LOOPBACK) -> None:
    """Write its configuration."""
    config = SmallModelConfig(
        port=ports[names.SMALL_MODEL],
        ops_host=network.listen,
        ops_port=ports[names.ops_port(names.SMALL_MODEL)],
        engine_network=network.by_name,
    )
    write_config(home.config_file(names.SMALL_MODEL), config)


def small_model_spec(home: Home, ports: dict[str, int]) -> ProcessSpec:
    """Return how it is run. Nothing else waits for it for long: models may come and go."""
    return ProcessSpec(
        name=names.SMALL_MODEL,
        command=module_command("hive_executor.small_model_process", home.config_file(names.SMALL_MODEL)),
        log_file=home.log_file(names.SMALL_MODEL),
        probe=http_probe(ports[names.ops_port(names.SMALL_MODEL)]),
        silence_s=SILENCE_S,
        essential=False,
    )
