;; A component of the world hive:agent/agent, written by hand: returns its input as an error.
(component
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
  (core module $agent_module
    (import "heap" "memory" (memory 1))
    (func (export "run") (param $at i32) (param $length i32) (result i32)
      (i32.store (i32.const 0) (i32.const 1))
      (i32.store (i32.const 4) (local.get $at))
      (i32.store (i32.const 8) (local.get $length))
      (i32.const 0)))
  (core instance $agent (instantiate $agent_module
    (with "heap" (instance $heap))))
  (func (export "run") (param "input" string) (result (result string (error string)))
    (canon lift (core func $agent "run") (memory $memory) (realloc $realloc))))
