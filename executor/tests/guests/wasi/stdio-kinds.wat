;; The streams are there, and none says that it is a terminal.
(module
  (import "wasi_snapshot_preview1" "fd_fdstat_get" (func $fd_fdstat_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start") (local $fd i32)
    (loop $next
      (call $must (i32.eqz (call $fd_fdstat_get (local.get $fd) (i32.const 0))) (i32.const 1))
      ;; a character device that may neither be sought nor told its place is a terminal (rights 2 and 5)
      (if (i32.eq (i32.load8_u (i32.const 0)) (i32.const 2))
        (then (call $must (i32.and (i32.load (i32.const 8)) (i32.const 36)) (i32.const 2))))
      (local.set $fd (i32.add (local.get $fd) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $fd) (i32.const 3))))))
