def run(input: dict) -> dict:
    return {"total": sum(one["square"] for one in input["squares"])}
