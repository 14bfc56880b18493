def run(input: dict) -> dict:
    if "results" in input:
        found = [int(one["value"]["answer"][1:]) for one in input["results"] if one["status"] == "succeeded"]
        return {"count": len(found), "sum": sum(found), "partial": input["partial"]}
    if "a" in input:
        return {"equal": input["a"]["answer"] == input["b"]["answer"]}
    passed = input["output"]["answer"] == f"={input['input']['n'] ** 2:010d}"
    return {"score": float(passed), "passed": passed}
