"""Event log, bus, RPC, contracts and operations shared by every HiveFabric member."""
