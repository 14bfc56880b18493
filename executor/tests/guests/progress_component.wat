;; A component of the world hive:agent/agent, written by hand: says of its progress what its input says, and returns
;; the answer, or the code of the failure as its error.
(component
  (import "hive:agent/progress@0.1.0" (instance $progress
    (type $fields (record (field "code" string) (field "message" string)))
    (export "failure" (type $failure (eq $fields)))
    (export "mark" (func (param "request" string) (result (result string (error $failure)))))))
  (core module $heap_module
    (memory (export "memory") 1)
    (global $next (mut i32) (i32.const 1024))
    (func (export "realloc") (param $old i32) (param $old_size i32) (param $align i32) (param $size i32) (result i32)
      (local $at i32)
      (local.set $at (global.get $next))
      (global.set $next (i32.and (i32.add (i32.add (local.get $at) (local.get $size)) (i32.const 7)) (i32.const -8)))
      (local.get $at)))
  (core instance $heap (instantiate $heap_module))
  (alias core export $heap "memory" (core memory $memory))
  (alias core export $heap "realloc" (core func $realloc))
  (core func $mark (canon lower (func $progress "mark") (memory $memory) (realloc $realloc)))
  (core module $agent_module
    (import "heap" "memory" (memory 1))
    (import "progress" "mark" (func $mark (param i32 i32 i32)))
    ;; The result of `mark` lies at 0: whether it is an error, then a text, or two. That of `run` is the same
    ;; with one text, which for an error is the first of the two.
    (func (export "run") (param $at i32) (param $length i32) (result i32)
      (call $mark (local.get $at) (local.get $length) (i32.const 0))
      (i32.const 0)))
  (core instance $agent (instantiate $agent_module
    (with "heap" (instance $heap))
    (with "progress" (instance (export "mark" (func $mark))))))
  (func (export "run") (param "input" string) (result (result string (error string)))
    (canon lift (core func $agent "run") (memory $memory) (realloc $realloc))))
