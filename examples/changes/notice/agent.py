import hashlib

from hive import kv, log


def run(input: dict) -> dict:
    # A path may have characters that a key has not.
    key = "files/" + hashlib.sha256(input["path"].encode()).hexdigest()
    digest = hashlib.sha256(input["text"].encode()).hexdigest()
    before = kv.get(key)
    seen = 1 if before is None else before["seen"] + 1
    if before is None:
        state = "new"
    elif before["digest"] != digest:
        state = "changed"
    else:
        state = "same"
    log.info("%s: %s, seen %d times", input["path"], state, seen)
    kv.put(key, {"path": input["path"], "digest": digest, "seen": seen})
    return {"path": input["path"], "state": state, "seen": seen}
