;; A component whose `realloc`, which the host calls to hand over the input, calls the host again.
(component
  (import "hive:agent/log@0.1.0" (instance $log
    (type $cases (enum "debug" "info" "warning" "error"))
    (export "level" (type $level (eq $cases)))
    (export "write" (func (param "level" $level) (param "message" string)))))
  (core module $memory_module (memory (export "memory") 1))
  (core instance $heap (instantiate $memory_module))
  (alias core export $heap "memory" (core memory $memory))
  (core func $write (canon lower (func $log "write") (memory $memory)))
  (core module $agent_module
    (import "heap" "memory" (memory 1))
    (import "log" "write" (func $write (param i32 i32 i32)))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (call $write (i32.const 2) (i32.const 0) (i32.const 16))
      (i32.const 1024))
    (func (export "run") (param $at i32) (param $length i32) (result i32)
      (i32.const 0)))
  (core instance $agent (instantiate $agent_module
    (with "heap" (instance $heap))
    (with "log" (instance (export "write" (func $write))))))
  (alias core export $agent "realloc" (core func $realloc))
  (func (export "run") (param "input" string) (result (result string (error string)))
    (canon lift (core func $agent "run") (memory $memory) (realloc $realloc))))
