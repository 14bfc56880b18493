"""Names of the processes of an installation, and what is numbered or named after them."""

POSTGRES = "postgres"
NATS = "nats"
SUPERVISOR = "supervisor"
GATEWAY = "gateway"
AUDIT = "audit"
REGISTRY = "registry"
ROUTER = "router"
SCHEDULER = "scheduler"
SMALL_MODEL = "small-model"
MODULES = {
    REGISTRY: "hive_registry",
    SCHEDULER: "hive_scheduler",
    ROUTER: "hive_router",
    AUDIT: "hive_audit",
    GATEWAY: "hive_gateway",
}
"""Services and the packages that they are started from."""

SERVICES = tuple(MODULES)
PEERS = tuple(name for name in SERVICES if name != GATEWAY)
"""Services that are called over gRPC by others. The gateway's gRPC port is the public one."""


def executor_name(number: int) -> str:
    """Return the name of the executor with this number, counted from 1."""
    return f"executor-{number}"


def ops_port(process: str) -> str:
    """Return the name of the port that a process shows its health and metrics on."""
    return f"{process}_ops"


def grpc_port(service: str) -> str:
    """Return the name of the port that a service answers its peers on."""
    return "grpc" if service == GATEWAY else f"{service}_grpc"


def port_names(executors: list[str], *, small_model: bool = False) -> list[str]:
    """Return the names of every port that an installation with these executors listens on."""
    return [
        "http",
        "grpc",
        "nats",
        "postgres",
        "nats_monitor",
        *(grpc_port(name) for name in PEERS),
        *(ops_port(name) for name in SERVICES),
        *(ops_port(name) for name in executors),
        *((SMALL_MODEL, ops_port(SMALL_MODEL)) if small_model else ()),
    ]
