;; Both clocks have a resolution and a time, and the monotonic one does not run backwards.
(module
  (import "wasi_snapshot_preview1" "clock_res_get" (func $clock_res_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock_time_get (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start") (local $clock i32)
    (loop $next
      (call $must (i32.eqz (call $clock_res_get (local.get $clock) (i32.const 0))) (i32.const 1))
      (call $must (i64.ne (i64.load (i32.const 0)) (i64.const 0)) (i32.const 2))
      (call $must (i32.eqz (call $clock_time_get (local.get $clock) (i64.const 1) (i32.const 8))) (i32.const 3))
      (call $must (i32.eqz (call $clock_time_get (local.get $clock) (i64.const 1) (i32.const 16))) (i32.const 4))
      (local.set $clock (i32.add (local.get $clock) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $clock) (i32.const 2))))
    (call $must (i64.ge_u (i64.load (i32.const 16)) (i64.load (i32.const 8))) (i32.const 5))))
