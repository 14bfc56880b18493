;; Wants a function that nobody grants.
(module (import "env" "secret" (func)) (func (export "_start") (call 0)))
