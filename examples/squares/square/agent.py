from hive import log


def run(input: dict) -> dict:
    log.info(f"squaring {input['n']}")
    return {"square": input["n"] ** 2}
