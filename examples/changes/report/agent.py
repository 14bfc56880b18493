def run(input: dict) -> dict:
    states: dict = {"new": [], "changed": [], "same": []}
    for file in input["files"]:
        states[file["state"]].append(file["path"])
    return {"files": len(input["files"]), **states}
